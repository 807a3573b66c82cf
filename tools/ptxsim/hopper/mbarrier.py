# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles mbarrier instructions, and keeps the mbarrier objects of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import DeadlockError, SimError, unsupported
from ..lanes import active, put_active
from ..memops.addressing import GetAddress, address
from ..memops.shared import ATOMIC
from ..memory import SHARED_WINDOW
from ..ptx_types import Array, i32, i64, u32, u64
from ..syntax.elements import SINK

POLLS = 10000  # failed polls of one mbarrier, nothing else happening to it


def shared_offsets(a: Array) -> Array:
    """Returns offsets into shared memory of addresses, generic or not."""
    a = np.asarray(a).astype(i64)
    return np.where(a >= SHARED_WINDOW, a - SHARED_WINDOW, a)


def shared_offset(a: Any) -> int:
    """Returns the offset into shared memory of one address."""
    return int(shared_offsets(a))


class MBarrier:
    """Counts arrivals and bytes of one mbarrier object.

    `clocks` and `fenced` are what arrivals so far have released. `seen` is what the last completed
    phase gives to those who wait for it.
    """

    def __init__(self, count: int, warps: int) -> None:
        self.count = self.pending = count
        self.bytes_missing = self.phase = self.polls = 0
        # copies into shared memory that have not arrived: indices, data, warp, clock, line
        self.copies: list[tuple[Array, Array, int, int, int]] = []
        self.clocks, self.fenced = np.zeros(warps, i32), np.zeros(warps, i32)
        self.seen = self.clocks, self.fenced

    def settle(self) -> None:
        """Completes the phase if nothing is missing."""
        if self.pending == 0 and self.bytes_missing == 0:
            self.phase += 1
            self.pending = self.count
            self.seen = self.clocks.copy(), self.fenced.copy()
        self.polls = 0


class BulkCopies:
    """Holds the mbarriers and bulk copies of a batch of CTAs."""

    def __init__(self, state: State) -> None:
        self.barriers: dict[int, MBarrier] = {}  # by position in the batch's shared memory
        self.commits = np.zeros(state.n_lanes, i32)
        self.reads: list[tuple[int, int, Array]] = []  # copies to global: lane, group, indices

    def at(self, state: State, ins: Instr, lane: int, address: Any) -> MBarrier:
        """Returns the mbarrier at an address."""
        offset = shared_offset(address)
        barrier = self.barriers.get(int(state.shared.base[lane]) + offset)
        if barrier is None:
            state.fault(SimError, f"no mbarrier at shared offset {offset:#x}", ins, None, lane)
        return barrier

    def release(self, state: State, barrier: MBarrier, lane: int) -> None:
        """Gives what a lane knows of to those who wait."""
        shared = state.shared
        if shared.race:
            warp = state.warp_of[lane]
            np.maximum(barrier.clocks, shared.clocks[warp], out=barrier.clocks)
            np.maximum(barrier.fenced, shared.fenced[warp], out=barrier.fenced)

    def acquire(self, state: State, barrier: MBarrier, lanes: Array) -> None:
        """Gives lanes what the last phase released."""
        shared = state.shared
        if shared.race:
            warps = np.unique(state.warp_of[lanes])
            shared.clocks[warps] = np.maximum(shared.clocks[warps], barrier.seen[0])
            shared.fenced[warps] = np.maximum(shared.fenced[warps], barrier.seen[1])

    def tick(self, state: State, lanes: Array) -> None:
        """Advances the clocks of the warps of these lanes."""
        if state.shared.race:
            state.shared.tick(np.unique(state.warp_of[lanes]))

    def poll(self, state: State, barrier: MBarrier) -> None:
        """Lets copies arrive: as late as can be told, when somebody asks."""
        shared = state.shared
        for index, data, warp, clock, line in barrier.copies:
            shared.land_bulk(index, data, warp, clock, line)
            if shared.race:
                own = warp % shared.warps
                barrier.clocks[own] = max(barrier.clocks[own], clock)
                # written by the async proxy: nothing to fence
                barrier.fenced[own] = max(barrier.fenced[own], clock)
            barrier.bytes_missing -= index.size * 16
        if barrier.copies:
            barrier.copies = []
            barrier.settle()


def compile_mbarrier(program: Program, ins: Instr) -> Step:
    """Compiles mbarrier.init, inval, arrive, expect_tx, try_wait and test_wait."""
    parts, args = ins.parts, list(ins.args)
    op = parts[1]
    if "shared::cluster" in parts or "noComplete" in parts:
        raise unsupported(ins)
    if op in ("init", "inval", "expect_tx"):
        get, _ = address(program, ins, args.pop(0))
        if op == "init":
            return _init(ins, get, program.src(args[0], "u32", ins))
        return _inval(ins, get) if op == "inval" else _arrive(program, ins, None, get, args)
    if op in ("arrive", "try_wait", "test_wait"):
        dst = args.pop(0)
        get, _ = address(program, ins, args.pop(0))
        if op == "arrive":
            return _arrive(program, ins, None if dst == SINK else program.dst(dst), get, args)
        return _wait(program, ins, program.dst(dst), get, args)
    raise unsupported(ins)


def _init(ins: Instr, get: GetAddress, count: int) -> Step:
    def step(state: State) -> None:
        a = shared_offsets(active(state, get(state)))
        index = state.shared.plain_write(state, ins, a, state.lanes_or_none(), 8)
        state.shared.mark_valid(index << 3, 8)
        counts = active(state, state.regs[count])
        for lane, offset, n in zip(state.lanes(), a, counts, strict=True):
            key = int(state.shared.base[lane]) + int(offset)
            state.bulk.barriers[key] = MBarrier(int(n), state.cta_warps)

    return step


def _inval(ins: Instr, get: GetAddress) -> Step:
    def step(state: State) -> None:
        a = shared_offsets(active(state, get(state)))
        index = state.shared.plain_write(state, ins, a, state.lanes_or_none(), 8)
        state.shared.mark_valid(index << 3, 8)
        for lane, offset in zip(state.lanes(), a, strict=True):
            state.bulk.at(state, ins, lane, offset)
            del state.bulk.barriers[int(state.shared.base[lane]) + int(offset)]

    return step


def _touch(state: State, ins: Instr, get: GetAddress) -> Array:
    """Accesses mbarriers as atomics on 8 bytes; returns their offsets."""
    a = shared_offsets(active(state, get(state)))
    index = state.shared.locate(state, ins, a, state.lanes_or_none(), 8, ATOMIC)
    state.shared.mark_valid(index << 3, 8)
    return a


def _arrive(
    program: Program, ins: Instr, dst: int | None, get: GetAddress, args: list[Any]
) -> Step:
    """Compiles arrivals, expectations of bytes, and both in one."""
    arrives, expects = ins.parts[1] == "arrive", "expect_tx" in ins.parts
    value = program.src(args[0], "u32", ins) if args else None

    def arrive(state: State, barrier: MBarrier, lane: int, n: int) -> None:
        state.bulk.release(state, barrier, lane)
        barrier.pending -= n
        if barrier.pending < 0:
            message = f"more arrivals than the {barrier.count} the mbarrier expects"
            state.fault(SimError, message, ins, None, lane)
        barrier.settle()

    def step(state: State) -> None:
        a = _touch(state, ins, get)
        lanes = state.lanes()
        n = np.ones(len(lanes), u32) if value is None else active(state, state.regs[value])
        phases = np.zeros(len(lanes), u64)
        for k, lane in enumerate(lanes):
            barrier = state.bulk.at(state, ins, lane, a[k])
            phases[k] = barrier.phase
            if expects:
                barrier.bytes_missing += int(n[k])
            if arrives:
                arrive(state, barrier, lane, 1 if expects else int(n[k]))
        if arrives:
            state.bulk.tick(state, lanes)
        if dst is not None:
            put_active(state, dst, phases)

    return step


def _wait(program: Program, ins: Instr, dst: int, get: GetAddress, args: list[Any]) -> Step:
    """Compiles waits for a phase, which is named by its parity or its number."""
    parity = "parity" in ins.parts
    wanted = program.src(args[0], "u32" if parity else "b64", ins)

    def step(state: State) -> None:
        state.spin += 1
        lanes, want = state.lanes(), active(state, state.regs[wanted])
        base = state.shared.base
        keys = base[lanes] + _touch(state, ins, get)
        done = np.zeros(len(lanes), bool)
        for key in np.unique(keys):
            mine = keys == key
            lane = int(lanes[np.argmax(mine)])
            offset = int(key - base[lane])
            barrier = state.bulk.at(state, ins, lane, offset)
            state.bulk.poll(state, barrier)
            complete = (barrier.phase & 1) != (want & 1) if parity else barrier.phase > want
            here = mine & complete
            done |= here
            if here.any():
                state.bulk.acquire(state, barrier, lanes[here])
            else:
                _count_poll(state, ins, barrier, lane, offset)
        put_active(state, dst, done)

    return step


def _count_poll(state: State, ins: Instr, barrier: MBarrier, lane: int, offset: int) -> None:
    barrier.polls += 1
    if barrier.polls > POLLS:
        message = (
            f"mbarrier at shared offset {offset:#x} never completes its phase: "
            f"{barrier.pending} arrivals and {barrier.bytes_missing} bytes are missing"
        )
        state.fault(DeadlockError, message, ins, None, lane)
