# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The state of a batch of CTAs in flight: lanes, registers, memory, counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..errors import SimError
from ..hopper.mbarrier import BulkCopies
from ..hopper.product_queue import ProductQueue
from ..memops.shared import Shared
from ..ptx_types import UDT, Array, align_up, i64, u32
from .special_registers import position, special_value

if TYPE_CHECKING:
    from ..syntax.elements import Instr
    from .launch import Launch
    from .program import Program

# unwritten registers hold NaN patterns
POISON = {1: False, 16: 0x7FAD, 32: 0x7FBADBAD, 64: 0x7FF4BADBADBADBAD}
KEPT_FRAGMENTS = 96


class State:
    """Holds one batch of CTAs in flight, whose lanes all advance together.

    `mask` names the lanes that execute the current instruction; it is None when all do.
    `write_mask` is None also when only lanes are missing that are beyond the block's size or have
    exited: they may be written.
    """

    def __init__(self, program: Program, launch: Launch, cta0: int, n_cta: int) -> None:
        self.program: Program = program
        self.launch: Launch = launch
        self.device = program.module.device
        self.checks, self.stats, self.want_stats = launch.checks, launch.stats, launch.want_stats
        self.n_cta, self.cta0 = n_cta, cta0
        self.steps = launch.steps
        self.mma_flops = 0
        self.spin = 0  # atomics and volatile loads since a waiting group last got its turn
        self._init_lanes()
        self._init_memory()
        self._init_registers()

    def _init_lanes(self) -> None:
        bx, by, bz = self.launch.block
        self.cta_threads = bx * by * bz
        self.cta_lanes = align_up(self.cta_threads, 32)
        self.cta_warps = self.cta_lanes // 32
        n = self.n_lanes = self.n_cta * self.cta_lanes
        self.n_warps = n // 32
        self.all_lanes = np.arange(n, dtype=i64)
        self.all_true = np.ones(n, bool)
        self.tid = self.all_lanes % self.cta_lanes
        self.lane_cta = self.all_lanes // self.cta_lanes
        self.live = self.exists = self.tid < self.cta_threads
        self.live_n = self.start_n = int(self.live.sum())
        self.live_cta = np.full(self.n_cta, self.cta_threads)
        self.warp_of = self.all_lanes // 32
        self.laneid = (self.all_lanes % 32).astype(u32)
        self.warpbase = self.all_lanes - self.all_lanes % 32
        self.mask: Array | None = None
        self.write_mask: Array | None = None
        self._active: Array | None = None
        self._outer_masks: list[tuple[Array | None, ...]] = []

    def _init_memory(self) -> None:
        program, launch, n = self.program, self.launch, self.n_lanes
        self.shared = Shared(
            self.n_cta,
            launch.shared_bytes,
            self.cta_warps,
            self.checks,
            program.granularity,
            self.cta_lanes,
        )
        self.local_size = align_up(program.local_size, 16)
        self.local = np.full(max(16, n * self.local_size), 0xFF, np.uint8)
        self.buffers = [np.zeros((n, size), np.uint8) for size in program.buffer_sizes]
        self.params, self.params_padded = launch.params, launch.params_padded
        self.groups_done = np.zeros(n, np.int32)
        self.async_queue: list[list[Any]] = []
        self.wgmma = ProductQueue(self)
        self.bulk = BulkCopies(self)

    def _init_registers(self) -> None:
        program = self.program
        self.carry = np.zeros(self.n_lanes, bool)
        self.fragments: dict[Any, Any] = {}  # unpacked operands of mma
        self.matrix_lanes: dict[Any, Any] = {}  # lanes whose addresses ldmatrix and stmatrix use
        self.regs: list[Any] = [
            np.array([POISON[bits]], UDT[bits]) if bits in UDT else None for bits in program.slots
        ]
        for (value, bits), slot in program.constants.items():
            self.regs[slot] = np.array([value], UDT[bits])
        for (name, bits), slot in program.specials.items():
            self.regs[slot] = special_value(self, name, bits)

    # -- lanes
    def active_lanes(self) -> Array:
        """Returns the indices of the active lanes where `mask` is not None."""
        if self._active is None:
            self._active = np.flatnonzero(self.mask)
        return self._active

    def lanes_or_none(self) -> Array | None:
        """Returns the indices of the active lanes, None when all are active."""
        return None if self.mask is None else self.active_lanes()

    def lanes(self) -> Array:
        """Returns the indices of the active lanes."""
        return self.all_lanes if self.mask is None else self.active_lanes()

    def active_mask(self) -> Array:
        """Returns the active lanes as one bool for each lane."""
        return self.all_true if self.mask is None else self.mask

    def set_mask(self, mask: Array | None, write_mask: Array | None) -> None:
        """Makes these the active lanes."""
        self.mask, self.write_mask, self._active = mask, write_mask, None

    def push_mask(self, mask: Array) -> None:
        """Narrows the active lanes until `pop_mask`."""
        self._outer_masks.append((self.mask, self.write_mask, self._active))
        self.set_mask(mask, mask)

    def pop_mask(self) -> None:
        """Restores the active lanes that `push_mask` replaced."""
        self.mask, self.write_mask, self._active = self._outer_masks.pop()

    def where(self, lane: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the CTA and the thread of a lane, three coordinates each."""
        thread = int(self.tid[lane])
        cta = int(self.cta0 + self.lane_cta[lane])
        return (
            tuple(position(cta, self.launch.grid, axis) for axis in "xyz"),
            tuple(position(thread, self.launch.block, axis) for axis in "xyz"),
        )

    def fault(
        self, error: type[SimError], message: str, ins: Instr, lanes: Array | None, k: int,
        **info: Any,
    ) -> NoReturn:  # fmt: skip
        """Raises an error that names the CTA and thread of the k-th of `lanes`.

        With None for `lanes`, k is the lane itself.
        """
        lane = int(k) if lanes is None else int(lanes[k])
        cta, thread = self.where(lane)
        raise error(message, self.program.entry.name, ins.line, ins.text, cta, thread, **info)

    # -- caches and counters
    def keep_fragment(self, key: Any, regs: list[Array], value: Array) -> tuple[list[Array], Array]:
        """Caches an unpacked operand under the ids of its registers.

        Keeping the registers alive keeps their ids unique.
        """
        if len(self.fragments) > KEPT_FRAGMENTS:
            self.fragments.clear()
        self.fragments[key] = hit = (regs, value)
        return hit

    def note_shared(
        self, kind: str, addresses: Array, lanes: Array | None, size: int, per: int | None = None
    ) -> None:
        """Counts requests and wavefronts of one access to shared memory."""
        actual, ideal = self.shared.banks.wavefronts(self, addresses, lanes, size, per)
        requests = self.n_warps if lanes is None else len(np.unique(self.warp_of[lanes]))
        total = self.stats.shared.setdefault(kind, [0, 0, 0])
        total[0] += requests
        total[1] += actual
        total[2] += ideal

    # -- cp.async
    def async_wait(self, n: int | None) -> None:
        """Lets copies of the active lanes land: all, or all but those of the last n groups."""
        keep = []
        for entry in self.async_queue:
            lanes, idx, data, group, size, line = entry
            done = np.ones(len(lanes), bool) if n is None else group < self.groups_done[lanes] - n
            if self.mask is not None:
                done &= self.mask[lanes]
            if done.all():
                self.shared.land_async(self, idx, lanes, size, data, line)
            elif done.any():
                self.shared.land_async(self, idx[done], lanes[done], size, data[done], line)
                rest = ~done
                keep.append([lanes[rest], idx[rest], data[rest], group[rest], size, line])
            else:
                keep.append(entry)
        self.async_queue = keep
