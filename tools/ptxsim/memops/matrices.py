# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles ldmatrix and stmatrix, which move 8 x 8 matrices of 16-bit elements."""

from __future__ import annotations

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import active, full, put_active
from ..memory import SHARED_WINDOW
from ..ptx_types import ELEM, Array, u16, u32, u64
from ..syntax.elements import SINK, items
from .addressing import GetAddress, address

ROW_BYTES = 16
ROWS_PER_PHASE = 8  # lanes whose accesses the banks serve together


def matrix_shape(ins: Instr) -> tuple[int, bool]:
    """Returns the number of matrices, and whether they are transposed."""
    parts = ins.parts
    if "m8n8" not in parts or parts[-1] != "b16":
        raise unsupported(ins)
    return int(next(p for p in parts if p in ("x1", "x2", "x4"))[1:]), "trans" in parts


def matrix_rows(state: State, get: GetAddress, number: int) -> tuple[Array, Array]:
    """Returns lanes and row addresses, 8 * number of them for each warp with active lanes."""
    addresses = full(state, get(state))
    key = (number, None if state.mask is None else state.mask.tobytes())
    lanes = state.matrix_lanes.get(key)
    if lanes is None:
        rows = state.all_lanes.reshape(-1, 32)
        if state.mask is not None:
            rows = rows[state.mask.reshape(-1, 32)[:, 0]]
        lanes = np.ascontiguousarray(rows[:, : 8 * number]).reshape(-1)
        state.matrix_lanes[key] = lanes
    return lanes, without_window(addresses[lanes])


def without_window(a: Array) -> Array:
    """Returns offsets of addresses that are in the shared window, generic or not."""
    if a.dtype == u64 and len(a) and int(a[0]) >= SHARED_WINDOW:
        return a - u64(SHARED_WINDOW)
    return a


def compile_ldmatrix(program: Program, ins: Instr) -> Step:
    """Compiles ldmatrix."""
    number, transposed = matrix_shape(ins)
    slots = [None if item == SINK else program.dst(item) for item in items(ins.args[0])]
    get, _ = address(program, ins, ins.args[1])

    def step(state: State) -> None:
        lanes, a = matrix_rows(state, get, number)
        if len(lanes) == 0:
            return
        if state.want_stats:
            state.note_shared("ldmatrix", a, lanes, ROW_BYTES, ROWS_PER_PHASE)
        raw = state.shared.load(state, ins, a, lanes, ROW_BYTES)
        warps = len(lanes) // (8 * number)
        if transposed:
            rows = raw.view(u16).reshape(warps, number, 8, 8).transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(rows).view(u32).reshape(warps, number, 32)
        else:
            words = raw.view(u32).reshape(warps, number, 32)
        for k, slot in enumerate(slots):
            put_active(state, slot, np.ascontiguousarray(words[:, k]).reshape(-1))

    return step


def compile_stmatrix(program: Program, ins: Instr) -> Step:
    """Compiles stmatrix."""
    number, transposed = matrix_shape(ins)
    get, _ = address(program, ins, ins.args[0])
    slots = [program.src(item, "b32", ins) for item in items(ins.args[1])]

    def step(state: State) -> None:
        lanes, a = matrix_rows(state, get, number)
        if len(lanes) == 0:
            return
        warps = len(lanes) // (8 * number)
        words = np.empty((warps, number, 32), u32)
        for k, slot in enumerate(slots):
            words[:, k] = active(state, state.regs[slot]).reshape(warps, 32)
        if transposed:
            rows = words.view(u16).reshape(warps, number, 8, 8).transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(rows)
        if state.want_stats:
            state.note_shared("stmatrix", a, lanes, ROW_BYTES, ROWS_PER_PHASE)
        data = words.reshape(-1).view(ELEM[ROW_BYTES])
        state.shared.store(state, ins, a, lanes, ROW_BYTES, data)

    return step
