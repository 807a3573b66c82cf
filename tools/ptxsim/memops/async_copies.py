# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles cp.async, which copies from global to shared memory behind the program's back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import OutOfBoundsError, unsupported
from ..hopper.bulk_copies import compile_bulk
from ..lanes import active
from ..ptx_types import ELEM, Array, u8, u32
from ..syntax.elements import Reg
from .addressing import address
from .global_memory import as_u64, global_load


def compile_cp(program: Program, ins: Instr) -> Step:
    """Compiles cp.async: copies, groups and waits."""
    parts = ins.parts
    if parts[1:3] == ["async", "bulk"]:
        return compile_bulk(program, ins)
    if parts[1] != "async" or "reduce" in parts or "tensor" in parts:
        raise unsupported(ins)
    if "commit_group" in parts:
        return _commit
    if "wait_group" in parts or "wait_all" in parts:
        n = ins.args[0].value if "wait_group" in parts else None
        return lambda state: state.async_wait(n)
    if "mbarrier" in parts:
        raise unsupported(ins)
    return _copy(program, ins)


def _commit(state: State) -> None:
    mask = state.write_mask
    state.groups_done = state.groups_done + (1 if mask is None else mask)


def _source_bytes(program: Program, ins: Instr, size: int) -> Callable[[State], Array] | None:
    """Returns what computes how many bytes each active lane copies, None when it is always all."""
    hint = any("cache_hint" in p for p in ins.parts)
    rest = ins.args[3 : len(ins.args) - (1 if hint else 0)]
    if not rest:
        return None
    if isinstance(rest[0], Reg) and rest[0].width == 1:
        ignore = program.pred(rest[0], ins)
        return lambda state: np.where(active(state, ignore(state.regs)), u32(0), u32(size))
    slot = program.src(rest[0], "u32", ins)
    return lambda state: active(state, state.regs[slot])


def _copy(program: Program, ins: Instr) -> Step:
    to, _ = address(program, ins, ins.args[0])
    source, _ = address(program, ins, ins.args[1])
    size = ins.args[2].value
    if size not in (4, 8, 16) or ("cg" in ins.parts and size != 16):
        raise unsupported(ins, "cp.async size")
    source_bytes = _source_bytes(program, ins, size)

    def step(state: State) -> None:
        shared, a = active(state, to(state)), as_u64(active(state, source(state)))
        if len(shared) == 0:
            return
        wanted = None if source_bytes is None else source_bytes(state)
        if wanted is None or (wanted == size).all():
            data = global_load(state, ins, a, size)
        else:
            data = _partial(state, ins, a, wanted, size)
        if state.want_stats:
            state.note_shared("cp.async", shared, state.lanes_or_none(), size)
        index = state.shared.begin_async(state, ins, shared, state.lanes_or_none(), size)
        lanes = state.lanes()
        state.async_queue.append([lanes, index, data, state.groups_done[lanes], size, ins.line])

    return step


def _partial(state: State, ins: Instr, a: Array, wanted: Array, size: int) -> Array:
    """Loads fewer bytes than the size in some lanes; the rest are zeros."""
    if (wanted > size).any():
        k = int(np.argmax(wanted > size))
        message = f"cp.async source size {int(wanted[k])} above {size}"
        state.fault(OutOfBoundsError, message, ins, state.lanes_or_none(), k)
    data = np.zeros((len(a), size), u8)
    full = np.flatnonzero(wanted == size)
    if len(full):
        mask = np.zeros(state.n_lanes, bool)
        mask[state.lanes()[full]] = True
        state.push_mask(mask)
        data[full] = global_load(state, ins, a[full], size).view(u8).reshape(-1, size)
        state.pop_mask()
    for k in np.flatnonzero((wanted > 0) & (wanted < size)):
        start, n = int(a[k]), int(wanted[k])
        alloc = state.device.find(start)
        if alloc is None or start + n > alloc.end:
            message = f"cp.async reads {n} bytes at {start:#x}: {state.device.near(start)}"
            state.fault(OutOfBoundsError, message, ins, state.lanes_or_none(), int(k))
        data[k, :n] = alloc.mem[start - alloc.base : start - alloc.base + n]
    return data.view(ELEM[size]).reshape(-1)
