# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles shuffles, votes and reductions of a warp."""

from __future__ import annotations

import numpy as np

from ..compiling import Compiler, Instr, Program, State, Step
from ..errors import WarpSyncError, unsupported
from ..lanes import BIT, full, put, warp_bits
from ..ptx_types import DT, Array, i32, i64, u16, u32
from ..syntax.elements import SINK, Operand, Pair
from .mma import compile_mma

REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def destinations(program: Program, operand: Operand) -> tuple[int, int | None]:
    """Returns the slots of a destination and of the predicate beside it."""
    if isinstance(operand, Pair):
        return program.dst(operand.first), program.dst(operand.second)
    return program.dst(operand), None


# ---- shuffles
def source_lanes(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Returns the lane that each lane of a shuffle reads, and whether it is in range."""
    clamp, segment = c & 31, (c >> 8) & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        source = lane - b
        inside = source >= last
    else:
        first = lane & segment
        source = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = source <= last
    return np.where(inside, source, lane), inside


def compile_shfl(program: Program, ins: Instr) -> Step:
    """Compiles shfl."""
    parts = ins.parts
    mode = parts[2] if parts[1] == "sync" else parts[1]
    if parts[-1] != "b32":
        raise unsupported(ins)
    d, dp = destinations(program, ins.args[0])
    a, b, c = (program.src(o, "b32", ins) for o in ins.args[1:4])

    def step(state: State) -> None:
        offset = (state.regs[b] & u32(31)).astype(i64)
        bounds = state.regs[c].astype(i64)
        source, inside = source_lanes(mode, state.laneid.astype(i64), offset, bounds)
        lanes = state.warpbase + source
        if state.mask is not None:
            bad = state.mask & ~state.mask[lanes]
            if bad.any():
                k = int(np.argmax(bad))
                message = (
                    f"shfl reads lane {int(source[k])}, which does not execute the instruction"
                )
                state.fault(WarpSyncError, message, ins, None, k)
        put(state, d, full(state, state.regs[a])[lanes])
        if dp is not None:
            put(state, dp, full(state, inside).copy())

    return step


# ---- votes
def compile_vote(program: Program, ins: Instr) -> Step:
    """Compiles vote."""
    parts = ins.parts
    mode = next(p for p in parts[1:] if p in ("all", "any", "uni", "ballot"))
    d = program.dst(ins.args[0])
    vote = program.pred(ins.args[1], ins)
    members = program.src(ins.args[2], "b32", ins) if "sync" in parts else None

    def step(state: State) -> None:
        mask = state.active_mask()
        voters = np.repeat(warp_bits(mask), 32)
        if members is not None:
            voters = full(state, state.regs[members]) & voters
        ballot = np.repeat(warp_bits(mask & vote(state.regs)), 32) & voters
        if mode == "ballot":
            result = ballot
        elif mode == "all":
            result = ballot == voters
        elif mode == "any":
            result = ballot != 0
        else:
            result = (ballot == voters) | (ballot == 0)
        put(state, d, result)

    return step


def membership(state: State, members: Array) -> Array:
    """Returns (warps, lane, other lane): whether the mask of a lane names another active one."""
    mask = state.active_mask().reshape(-1, 1, 32)
    named = full(state, members).reshape(-1, 32, 1)
    return ((named >> np.arange(32, dtype=u32)) & u32(1)).astype(bool) & mask


def _as_word(lanes: Array) -> Array:
    """Packs (warps, lane, other lane) into one word for each lane."""
    return (lanes * BIT).sum(2).astype(u32).reshape(-1)


def compile_match(program: Program, ins: Instr) -> Step:
    """Compiles match."""
    mode, ty = ins.parts[1], ins.parts[-1]
    d, dp = destinations(program, ins.args[0])
    a, members = program.src(ins.args[1], ty, ins), program.src(ins.args[2], "b32", ins)

    def step(state: State) -> None:
        value = full(state, state.regs[a]).reshape(-1, 32)
        named = membership(state, state.regs[members])
        equal = (value[:, :, None] == value[:, None, :]) & named
        if mode == "any":
            put(state, d, _as_word(equal))
            return
        all_equal = (equal == named).all(2).reshape(-1)
        put(state, d, np.where(all_equal, _as_word(named), u32(0)))
        if dp is not None:
            put(state, dp, all_equal)

    return step


# ---- reductions and the rest
def compile_redux(program: Program, ins: Instr) -> Step:
    """Compiles redux."""
    op, ty = ins.parts[2], ins.parts[-1]
    if ty == "f32" or op not in REDUCTIONS:
        raise unsupported(ins)
    d = program.dst(ins.args[0])
    a, members = program.src(ins.args[1], ty, ins), program.src(ins.args[2], "b32", ins)
    dt = DT[ty]
    info = np.iinfo(dt)
    all_ones = -1 if dt is i32 else info.max
    neutral = dt({"min": info.max, "max": info.min, "and": all_ones}.get(op, 0))

    def step(state: State) -> None:
        value = full(state, state.regs[a].view(dt)).reshape(-1, 1, 32)
        chosen = np.where(membership(state, state.regs[members]), value, neutral)
        result = REDUCTIONS[op].reduce(chosen, axis=2, dtype=dt)
        put(state, d, np.ascontiguousarray(result).view(u32).reshape(-1))

    return step


def compile_activemask(program: Program, ins: Instr) -> Step:
    """Compiles activemask."""
    d = program.dst(ins.args[0])
    return lambda state: put(state, d, np.repeat(warp_bits(state.active_mask()), 32))


def compile_elect(program: Program, ins: Instr) -> Step:
    """Compiles elect, which chooses the lowest lane."""
    dst = ins.args[0]
    d = None if dst.first == SINK else program.dst(dst.first)
    dp = program.dst(dst.second)
    members = program.src(ins.args[1], "b32", ins)

    def step(state: State) -> None:
        present = np.repeat(warp_bits(state.active_mask()), 32)
        candidates = full(state, state.regs[members]) & present
        lowest = candidates & (~candidates + u32(1))
        lane = np.bitwise_count(lowest - u32(1)).astype(u32)
        if d is not None:
            put(state, d, lane)
        put(state, dp, state.laneid == lane)

    return step


def compile_movmatrix(program: Program, ins: Instr) -> Step:
    """Compiles movmatrix, which transposes an 8 x 8 matrix in registers."""
    d, a = program.dst(ins.args[0]), program.src(ins.args[1], "b32", ins)

    def step(state: State) -> None:
        rows = np.ascontiguousarray(full(state, state.regs[a])).view(u16).reshape(-1, 8, 8)
        columns = np.ascontiguousarray(rows.transpose(0, 2, 1))
        put(state, d, columns.view(u32).reshape(-1))

    return step


WARPOPS: dict[str, Compiler] = {
    "mma": compile_mma,
    "shfl": compile_shfl,
    "vote": compile_vote,
    "match": compile_match,
    "redux": compile_redux,
    "activemask": compile_activemask,
    "elect": compile_elect,
    "movmatrix": compile_movmatrix,
}
