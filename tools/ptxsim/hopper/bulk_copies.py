# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles cp.async.bulk: copies of tiles that a tensor map describes (TMA).

A copy into shared memory arrives when somebody next polls its mbarrier. Until then its bytes are
marked as those of a cp.async are. A copy to global memory reads and writes when it is issued. Its
source must stay as it is until a cp.async.bulk.wait_group covers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import MisalignedError, RaceError, SimError, unsupported
from ..lanes import active
from ..memops.addressing import address
from ..ptx_types import ELEM, Array, i32, i64, u8, u64
from ..syntax.elements import Vec
from .mbarrier import shared_offset
from .tensor_maps import CONVERTED, ELEM_SIZE, FLOATS, bulk_range, read_map

CHUNKS_MASK = (0, 1, 3, 7)  # swizzle of none, 32, 64, 128 bytes -> 16-byte chunks in a row - 1
LARGEST_BOX = 256
UNSUPPORTED = {"multicast::cluster", "im2col", "reduce", "prefetch", "im2col_no_offs"}


class Tile:
    """Locates one box of a tensor: its rows in global memory, its 16-byte chunks in shared memory.

    `inside` are the rows that lie in the tensor, `left` and `right` bound the bytes of a row that
    do. `at` are the positions of these bytes in `alloc`, None when there are none.
    """

    def __init__(
        self, state: State, ins: Instr, lane: int, m: Any, coords: list[int], shared: int
    ) -> None:
        n, element = int(m["rank"]) + 1, int(m["elemtype"])
        if len(coords) != n or m["interleave_layout"] or element in CONVERTED:
            raise unsupported(ins, "this kind of tensor map")
        if (m["element_stride"][:n] != 1).any():
            raise unsupported(ins, "this kind of tensor map")
        box, dim = m["box_dim"][:n].astype(i64), m["global_dim"][:n].astype(i64)
        size, mask = ELEM_SIZE[element], CHUNKS_MASK[int(m["swizzle_mode"])]
        self.row_bytes = int(box[0]) * size
        self._check(state, ins, lane, m, box, shared)
        self.rows = int(np.prod(box[1:]))
        a = shared + np.arange(self.rows * self.row_bytes // 16) * 16
        self.chunks = a ^ (((a >> 7) & mask) << 4)
        self.fill = 0xFF if m["fill_mode"] and element in FLOATS else 0
        left = min(max(-coords[0], 0), int(box[0]))
        right = max(min(int(dim[0]) - coords[0], int(box[0])), left)
        self.left, self.right = left * size, right * size
        starts, inside = self._rows(m, box, dim, coords)
        self.inside = np.flatnonzero(inside)
        self.alloc: Any = None
        self.at: Any = None
        if len(self.inside) and right > left:
            width = self.right - self.left
            first = starts[self.inside] + coords[0] * size + self.left
            low, high = int(first.min()), int(first.max()) + width
            self.alloc = bulk_range(state, ins, lane, low, high, "global.shared" in ins.op)
            self.at = (first - self.alloc.base)[:, None] + np.arange(width)

    def _check(self, state: State, ins: Instr, lane: int, m: Any, box: Array, shared: int) -> None:
        n, mask = len(box), CHUNKS_MASK[int(m["swizzle_mode"])]
        start, strides = int(m["global_address"]), m["global_stride"][: n - 1]
        if shared % 128 or start % 16 or (strides % u64(16)).any():
            message = (
                f"bulk tensor copy: shared offset {shared:#x}, tensor {start:#x}, "
                f"strides {strides.tolist()}"
            )
            state.fault(MisalignedError, message, ins, None, lane)
        too_wide = mask and self.row_bytes > 16 * (mask + 1)
        if self.row_bytes % 16 or (box < 1).any() or (box > LARGEST_BOX).any() or too_wide:
            message = (
                f"bulk tensor copy: box {box.tolist()} of {ELEM_SIZE[int(m['elemtype'])]}-byte "
                f"elements, swizzle mode {int(m['swizzle_mode'])}"
            )
            state.fault(SimError, message, ins, None, lane)

    def _rows(self, m: Any, box: Array, dim: Array, coords: list[int]) -> tuple[Array, Array]:
        """Returns where each row of the box would start, and whether it is in the tensor."""
        at, inside = np.zeros(self.rows, i64), np.ones(self.rows, bool)
        rest = np.arange(self.rows)
        for d in range(1, len(box)):
            c = coords[d] + rest % box[d]
            rest = rest // box[d]
            inside &= (c >= 0) & (c < dim[d])
            at += c * i64(m["global_stride"][d - 1])
        return int(m["global_address"]) + at, inside

    def load(self) -> Array:
        """Returns the box, filled up where it is outside the tensor, as 16-byte elements."""
        data = np.full((self.rows, self.row_bytes), self.fill, u8)
        if self.at is not None:
            data[self.inside, self.left : self.right] = self.alloc.mem[self.at]
        return data.reshape(-1, 16).view(ELEM[16]).reshape(-1)

    def store(self, state: State, ins: Instr, lane: int, data: Array) -> None:
        """Writes what of the box is in the tensor."""
        if self.at is None:
            return
        rows = data.view(u8).reshape(self.rows, self.row_bytes)
        own = rows[self.inside, self.left : self.right]
        if state.checks.global_overlap:
            owner, cta = self.alloc.owners(), state.cta0 + state.lane_cta[lane]
            previous = owner[self.at]
            if ((previous >= 0) & (previous != cta) & (self.alloc.mem[self.at] != own)).any():
                message = f"bulk store into {self.alloc}: another CTA stored different values there"
                state.fault(RaceError, message, ins, None, lane)
            owner[self.at] = cta
        self.alloc.mem[self.at] = own

    def count(self, state: State, write: bool) -> None:
        """Counts the copy."""
        if self.at is None or not state.want_stats:
            return
        sectors = len(np.unique((self.at + self.alloc.base) >> 5))
        note = state.stats.note_store if write else state.stats.note_load
        note(self.at.size, 1, sectors)
        self.alloc.touch(self.at.reshape(-1), 1, 0, write)


def compile_bulk(program: Program, ins: Instr) -> Step:
    """Compiles groups of copies to global memory, and tensor copies in both directions."""
    parts = ins.parts
    if "commit_group" in parts:
        return _commit
    if "wait_group" in parts:
        n = ins.args[0].value
        return lambda state: _wait(state, n)
    variants = ("cta_group", "im2col", "tile::")
    if "tensor" not in parts or UNSUPPORTED & set(parts):
        raise unsupported(ins)
    if any(p.startswith(variants) for p in parts):
        raise unsupported(ins)
    if parts[5] == "global":  # the destination's space comes first
        return _copy_out(program, ins)
    if "mbarrier::complete_tx::bytes" not in parts:
        raise unsupported(ins)
    return _copy_in(program, ins)


def _commit(state: State) -> None:
    state.bulk.commits = state.bulk.commits + (1 if state.mask is None else state.mask)


def _wait(state: State, n: int) -> None:
    mask, keep = state.active_mask(), []
    for lane, group, index in state.bulk.reads:
        if mask[lane] and group < state.bulk.commits[lane] - n:
            state.shared.end_bulk_read(state, lane, index)
        else:
            keep.append((lane, group, index))
    state.bulk.reads = keep


class _Operands:
    """Reads the operands that copies in both directions have."""

    def __init__(self, program: Program, ins: Instr, shared: Any, tensor: Any) -> None:
        self.ins = ins
        self.shared, _ = address(program, ins, shared)
        self.map, _ = address(program, ins, tensor)
        if len(tensor.extra) != 1 or not isinstance(tensor.extra[0], Vec):
            raise unsupported(ins, "coordinates")
        self.coords = [program.src(o, "s32", ins) for o in tensor.extra[0].items]

    def tiles(self, state: State) -> Iterator[Tile]:
        """Yields the tile of each active lane."""
        shared, maps = active(state, self.shared(state)), active(state, self.map(state))
        coords = [active(state, state.regs[s]).view(i32) for s in self.coords]
        for k, lane in enumerate(state.lanes()):
            m = read_map(state, self.ins, lane, int(maps[k]))
            at = [int(c[k]) for c in coords]
            yield Tile(state, self.ins, lane, m, at, shared_offset(shared[k]))


def _copy_in(program: Program, ins: Instr) -> Step:
    operands = _Operands(program, ins, ins.args[0], ins.args[1])
    get_barrier, _ = address(program, ins, ins.args[2])

    def step(state: State) -> None:
        shared, lanes = state.shared, state.lanes()
        barriers = active(state, get_barrier(state))
        for lane, at, tile in zip(lanes, barriers, operands.tiles(state), strict=True):
            barrier = state.bulk.at(state, ins, lane, at)
            data = tile.load()
            tile.count(state, False)
            who = np.full(len(tile.chunks), lane)
            index = shared.begin_async(state, ins, tile.chunks, who, 16)
            warp = state.warp_of[lane]
            clock = int(shared.clocks[warp, warp % state.cta_warps]) if shared.race else 0
            barrier.copies.append((index, data, warp, clock, ins.line))
            barrier.polls = 0
        state.bulk.tick(state, lanes)

    return step


def _copy_out(program: Program, ins: Instr) -> Step:
    operands = _Operands(program, ins, ins.args[1], ins.args[0])

    def step(state: State) -> None:
        for lane, tile in zip(state.lanes(), operands.tiles(state), strict=True):
            who = np.full(len(tile.chunks), lane)
            index = state.shared.begin_bulk_read(state, ins, tile.chunks, who)
            state.bulk.reads.append((lane, state.bulk.commits[lane], index))
            tile.store(state, ins, lane, state.shared.views[16][index])
            tile.count(state, True)

    return step
