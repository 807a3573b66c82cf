# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Loads and stores in each space."""

from __future__ import annotations

import numpy as np

from ..compiling import Instr, State
from ..errors import MisalignedError, OutOfBoundsError, ReadOnlyError
from ..ptx_types import ELEM, LOG2, Array, i64
from .global_memory import global_load, global_store


def local_index(state: State, ins: Instr, a: Array, size: int) -> Array:
    """Checks offsets into local memory and returns indices of elements."""
    a = a.astype(i64)
    outside = (a < 0) | (a + size > state.local_size)
    if outside.any():
        k = int(np.argmax(outside))
        message = (
            f"local access of {size} bytes at offset {int(a[k])}, the frame has "
            f"{state.program.local_size} bytes"
        )
        state.fault(OutOfBoundsError, message, ins, state.lanes_or_none(), k)
    crooked = (a & (size - 1)) != 0
    if crooked.any():
        k = int(np.argmax(crooked))
        message = f"local access of {size} bytes at offset {int(a[k])}"
        state.fault(MisalignedError, message, ins, state.lanes_or_none(), k)
    return (a + state.lanes() * state.local_size) >> LOG2[size]


def param_load(state: State, ins: Instr, a: Array, size: int) -> Array:
    """Loads from the parameters of the kernel."""
    a = a.astype(i64)
    n = len(state.params)
    if int(a.min()) < 0 or int(a.max()) + size > n or (a & (size - 1)).any():
        message = f"parameter access of {size} bytes at offset {int(a.max())} of {n}"
        state.fault(OutOfBoundsError, message, ins, state.lanes_or_none(), 0)
    return state.params_padded.view(ELEM[size])[a >> LOG2[size]]


def load_from(state: State, ins: Instr, space: str, a: Array, size: int) -> Array:
    """Loads one element for each active lane from a space."""
    if space in ("global", "const"):
        return global_load(state, ins, a, size)
    if space == "shared":
        lanes = state.lanes_or_none()
        if state.want_stats:
            state.note_shared("ld.shared", a, lanes, size)
        return state.shared.load(state, ins, a, lanes, size)
    if space == "local":
        return state.local.view(ELEM[size])[local_index(state, ins, a, size)]
    return param_load(state, ins, a, size)


def store_to(state: State, ins: Instr, space: str, a: Array, size: int, values: Array) -> None:
    """Stores one element for each active lane into a space."""
    if space == "global":
        global_store(state, ins, a, size, values)
    elif space == "shared":
        lanes = state.lanes_or_none()
        if state.want_stats:
            state.note_shared("st.shared", a, lanes, size)
        state.shared.store(state, ins, a, lanes, size, values)
    elif space == "local":
        state.local.view(ELEM[size])[local_index(state, ins, a, size)] = values
    else:
        message = f"write to {space} memory"
        state.fault(ReadOnlyError, message, ins, state.lanes_or_none(), 0)
