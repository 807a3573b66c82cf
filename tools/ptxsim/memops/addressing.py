# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes addresses of operands, and sorts generic addresses by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import active
from ..memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW
from ..ptx_types import UDT, Array, u64
from ..syntax.elements import Mem, Operand, Reg

SPACES = ("global", "shared", "local", "param", "const")
ALL_BITS = (1 << 64) - 1
WINDOWS = (
    ("global", 0, SHARED_WINDOW),
    ("shared", SHARED_WINDOW, SHARED_WINDOW + WINDOW),
    ("local", LOCAL_WINDOW, LOCAL_WINDOW + WINDOW),
    ("param", PARAM_WINDOW, PARAM_WINDOW + WINDOW),
)

GetAddress = Callable[[State], Array]
Access = Callable[[State, str, Array], None]  # state, space, addresses of the active lanes


def space_of(parts: Sequence[str]) -> str:
    """Returns the space that an opcode names, or generic."""
    names = (p.split("::")[0] for p in parts)
    return next((name for name in names if name in SPACES), "generic")


def vec_of(parts: Sequence[str]) -> int:
    """Returns the number of elements that an opcode moves."""
    return next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)


def address(program: Program, ins: Instr, mem: Operand) -> tuple[GetAddress, str | None]:
    """Returns what computes an address, and the space of the variable that it names."""
    if not isinstance(mem, Mem):
        raise unsupported(ins, "expected an address")
    base, offset = mem.base, mem.offset
    if isinstance(base, Reg):
        slot = program.reg_slot(base)
        if offset == 0:
            return (lambda state: state.regs[slot]), None
        added = UDT[base.width](offset & ((1 << base.width) - 1))
        return (lambda state: state.regs[slot] + added), None
    space = None
    if base is not None:
        space, start = program.symbol(base.name, ins)
        offset += start + base.offset
    constant = np.array([offset & ALL_BITS], u64)
    return (lambda state: constant), space


def split_by_window(addresses: Array) -> list[tuple[str, Array | None, int]]:
    """Returns space, selected lanes and first address of each window with generic addresses.

    None selects all lanes.
    """
    low, high = int(addresses.min()), int(addresses.max())
    for space, start, end in WINDOWS:
        if start <= low and high < end:
            return [(space, None, start)]
    selections = []
    for space, start, end in WINDOWS:
        inside = (addresses >= u64(start)) & (addresses < u64(end))
        if inside.any():
            selections.append((space, inside, start))
    return selections


def accessor(program: Program, ins: Instr, mem: Operand, access: Access) -> Step:
    """Compiles an access to the space that the opcode, the variable or the address names."""
    get, of_symbol = address(program, ins, mem)
    space = space_of(ins.parts)
    if space == "generic" and of_symbol is not None:
        space = of_symbol
    return lambda state: dispatch(state, get(state), space, access)


def dispatch(state: State, addresses: Array, space: str, access: Access) -> None:
    """Makes an access, of generic addresses one for each window among them."""
    addresses = active(state, addresses)
    if len(addresses) == 0:
        return
    if space != "generic":
        access(state, space, addresses)
        return
    if addresses.dtype != u64:
        addresses = addresses.astype(u64)
    selections = split_by_window(addresses)
    if len(selections) == 1:
        name, _, start = selections[0]
        access(state, name, addresses - u64(start) if start else addresses)
        return
    lanes = state.lanes()
    for name, inside, start in selections:
        mask = np.zeros(state.n_lanes, bool)
        mask[lanes[inside]] = True
        state.push_mask(mask)
        access(state, name, addresses[inside] - u64(start))
        state.pop_mask()
