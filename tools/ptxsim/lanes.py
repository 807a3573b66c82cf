# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads and writes register values of the active lanes.

A register is an unsigned array of one element for each lane, or of one element when all lanes hold
the same. It is never modified in place, so that sharing and views of another type are safe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ptx_types import UDT, Array, u32, u64

if TYPE_CHECKING:
    from .machine.state import State

BIT = u64(1) << np.arange(32, dtype=u64)


def put(state: State, slot: int, value: Array) -> None:
    """Writes a register in the active lanes. `value` has an element for every lane, or one."""
    mask = state.write_mask
    regs = state.regs
    regs[slot] = value if mask is None else np.where(mask, value, regs[slot])


def full(state: State, value: Array) -> Array:
    """Returns a register value with an element for every lane."""
    return value if len(value) == state.n_lanes else np.broadcast_to(value, (state.n_lanes,))


def active(state: State, value: Array) -> Array:
    """Returns the elements of the active lanes."""
    value = full(state, value)
    return value if state.mask is None else value[state.active_lanes()]


def put_active(state: State, slot: int | None, value: Array) -> None:
    """Writes a register in the active lanes. `value` has an element for each active lane."""
    if slot is None:
        return
    if state.mask is None:
        state.regs[slot] = value
        return
    new = np.empty(state.n_lanes, value.dtype)
    new[:] = state.regs[slot]
    new[state.active_lanes()] = value
    state.regs[slot] = new


def warp_bits(mask: Array) -> Array:
    """Packs one bool for each lane into one 32-bit word for each warp."""
    return (mask.reshape(-1, 32) * BIT).sum(1).astype(u32)


def extend_to(value: Array, bits: int) -> Array:
    """Extends integers to registers of `bits`, with their sign where their type has one."""
    size = bits // 8
    if value.dtype.itemsize != size:
        value = value.astype(np.dtype(f"{value.dtype.kind}{size}"))
    return value.view(UDT[bits])
