# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes, reads and changes tensor maps.

A tensor map is opaque to programs. Here it is a MAP record, which `tensor_map` makes on the host
and tensormap.replace changes field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import OutOfBoundsError, ReadOnlyError, SimError, unsupported
from ..lanes import active
from ..memops.addressing import address
from ..memory import PARAM_WINDOW, Alloc
from ..ptx_types import u8, u32, u64
from .mbarrier import shared_offset, shared_offsets

MAP_BYTES = 128
MAP = np.dtype(
    [
        ("global_address", u64),
        ("rank", u32),
        ("elemtype", u32),
        ("swizzle_mode", u32),
        ("interleave_layout", u32),
        ("fill_mode", u32),
        ("unused", u32),
        ("global_dim", u32, 5),
        ("box_dim", u32, 5),
        ("element_stride", u32, 5),
        ("unused2", u32),
        ("global_stride", u64, 4),
    ]
)
# u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz
ELEM_SIZE = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
FLOATS, CONVERTED = (6, 7, 9, 10), (8, 11, 12)


def tensor_map(
    base: int,
    shape: Sequence[int],
    strides: Sequence[int],
    block: Sequence[int],
    elemtype: int,
    swizzle: int,
    nan_fill: bool = False,
) -> bytes:
    """Returns a tensor map. Sizes are outermost first, strides in elements, codes as in PTX."""
    m = np.zeros(1, MAP)
    n, size = len(shape), ELEM_SIZE[elemtype]
    m["global_address"], m["rank"] = base, n - 1
    m["elemtype"], m["swizzle_mode"], m["fill_mode"] = elemtype, swizzle, nan_fill
    m["global_dim"][0, :n], m["box_dim"][0, :n] = shape[::-1], block[::-1]
    m["element_stride"][0, :n] = 1
    m["global_stride"][0, : n - 1] = [s * size for s in strides[-2::-1]]
    return m.tobytes()


def compile_tensormap(program: Program, ins: Instr) -> Step:
    """Compiles tensormap.replace and tensormap.cp_fenceproxy."""
    parts = ins.parts
    if parts[1] == "replace":
        return _replace(program, ins)
    if parts[1] == "cp_fenceproxy" and parts[2:4] == ["global", "shared::cta"]:
        return _copy_out(program, ins)
    raise unsupported(ins)


def _replace(program: Program, ins: Instr) -> Step:
    parts = ins.parts
    field = parts[3]
    if parts[2] != "tile" or field not in MAP.names or "shared::cta" not in parts:
        raise unsupported(ins)
    get, _ = address(program, ins, ins.args[0])
    size = 8 if parts[-1] == "b64" else 4
    value = program.src(ins.args[-1], parts[-1], ins)
    at = MAP.fields[field][1] + (ins.args[1].value * size if len(ins.args) == 3 else 0)

    def step(state: State) -> None:
        a = shared_offsets(active(state, get(state))) + at
        new = active(state, state.regs[value])
        state.shared.store(state, ins, a, state.lanes_or_none(), size, new)

    return step


def _copy_out(program: Program, ins: Instr) -> Step:
    to, _ = address(program, ins, ins.args[0])
    source, _ = address(program, ins, ins.args[1])

    def step(state: State) -> None:
        lanes = state.lanes()
        first = np.flatnonzero(np.diff(state.warp_of[lanes], prepend=-1))  # one copy for each warp
        targets, sources = active(state, to(state))[first], active(state, source(state))[first]
        for lane, target, start in zip(lanes[first], targets, sources, strict=True):
            a = shared_offset(start) + np.arange(0, MAP_BYTES, 16)
            raw = state.shared.load(state, ins, a, np.full(len(a), lane), 16)
            low, high = int(target), int(target) + MAP_BYTES
            alloc = bulk_range(state, ins, lane, low, high, True)
            alloc.mem[low - alloc.base : high - alloc.base] = raw.view(u8)

    return step


def bulk_range(state: State, ins: Instr, lane: int, low: int, high: int, write: bool) -> Alloc:
    """Returns the allocation that a range of global memory lies in."""
    alloc = state.device.find(low)
    if alloc is None or high > alloc.end:
        message = (
            f"bulk {'write' if write else 'read'} of [{low:#x}, {high:#x}): "
            f"{state.device.near(low)}"
        )
        state.fault(OutOfBoundsError, message, ins, None, lane)
    if write and alloc.readonly:
        state.fault(ReadOnlyError, f"write to read-only {alloc}", ins, None, lane)
    return alloc


def read_map(state: State, ins: Instr, lane: int, at: int) -> Any:
    """Returns the record at a generic address."""
    if at >= PARAM_WINDOW:
        raw = state.params_padded[at - PARAM_WINDOW : at - PARAM_WINDOW + MAP_BYTES]
    else:
        alloc = bulk_range(state, ins, lane, at, at + MAP_BYTES, False)
        raw = alloc.mem[at - alloc.base : at - alloc.base + MAP_BYTES]
    m = raw.copy().view(MAP)[0]
    if at % 64 or not m["global_address"]:
        state.fault(SimError, f"no tensor map at {at:#x}", ins, None, lane)
    return m
