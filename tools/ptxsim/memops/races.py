# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds races in shared memory with a vector clock for each warp."""

from __future__ import annotations

import numpy as np

from ..compiling import Instr, State
from ..errors import MissingFenceError, RaceError
from ..ptx_types import LOG2, Array, i16, i32

SIZES = (1, 2, 4, 8, 16)


class RaceTracker:
    """Orders accesses to shared memory by warps.

    An access by warp u to bytes last written by warp w at clock c is ordered only if
    clocks[u][w] >= c. Barriers join the clocks of the warps that take part. Reads are kept by
    warp, so that a write is checked against every earlier reader.

    A read by the asynchronous proxy needs more than order. fenced[u][w] is the clock of w up to
    which a fence.proxy.async, ordered before what u does next, has covered the writes of w.
    """

    def __init__(self, n_cta: int, total: int, warps: int, race: bool, granularity: int) -> None:
        self.warps = warps
        self.race = race and warps > 1
        if not self.race:
            return
        self.unit_shift = LOG2[granularity]
        units, n = total >> self.unit_shift, n_cta * warps
        # the last write of each unit
        self.writer, self.write_clock = np.zeros(units, i16), np.zeros(units, i32)
        self.write_line = np.zeros(units, i32)
        self.by_atomic, self.by_copy = np.zeros(units, bool), np.zeros(units, bool)
        # the last read of each unit, by warp
        self.read_clock = np.zeros((units, warps), i32)
        self.clocks, self.fenced = np.zeros((n, warps), i32), np.zeros((n, warps), i32)
        self.clocks[np.arange(n), np.arange(n) % warps] = 1
        self._fan = {size: np.arange(max(1, size >> self.unit_shift)) for size in SIZES}

    # -- order
    def sync_all(self) -> None:
        """Orders all warps of each CTA, as a barrier of all does."""
        if not self.race:
            return
        w = self.warps
        clocks, fenced = self.clocks.reshape(-1, w, w), self.fenced.reshape(-1, w, w)
        clocks[:] = clocks.max(1, keepdims=True)
        clocks[:, np.arange(w), np.arange(w)] += 1
        fenced[:] = fenced.max(1, keepdims=True)

    def sync_some(self, warps: Array) -> None:
        """Orders these warps, CTA by CTA. Their numbers count through the batch."""
        if not self.race:
            return
        for cta in np.unique(warps // self.warps):
            rows = warps[warps // self.warps == cta]
            self.clocks[rows] = self.clocks[rows].max(0)
            self.clocks[rows, rows % self.warps] += 1
            self.fenced[rows] = self.fenced[rows].max(0)

    def tick(self, warps: Array) -> None:
        """Advances the own clocks of warps, so that what they do next is told from the past."""
        self.clocks[warps, warps % self.warps] += 1

    def proxy_fence(self, state: State) -> None:
        """Lets the asynchronous proxy see what the active warps know of.

        A warp counts if any of its lanes executes the fence.
        """
        if not self.race:
            return
        warps = np.unique(state.warp_of[state.lanes()])
        self.fenced[warps] = np.maximum(self.fenced[warps], self.clocks[warps])
        self.tick(warps)  # later writes are not covered

    # -- accesses: `bytes_at` are positions in the shared memory of the whole batch
    def units(self, bytes_at: Array, size: int) -> Array:
        """Returns the units that each access of `size` bytes touches."""
        return (bytes_at >> self.unit_shift)[:, None] + self._fan[size]

    def _warps_of(self, state: State, lanes: Array | None) -> tuple[Array, Array]:
        warps = state.warp_of if lanes is None else state.warp_of[lanes]
        return warps, warps % self.warps

    def record_write(
        self, units: Array, warp: Array, clock: Array | int, line: int,
        atomic: bool = False, copy: bool = False,
    ) -> None:  # fmt: skip
        """Records who wrote units last."""
        self.writer[units], self.write_clock[units], self.write_line[units] = warp, clock, line
        self.by_atomic[units], self.by_copy[units] = atomic, copy

    def check_read(
        self, state: State, ins: Instr, a: Array, bytes_at: Array, lanes: Array | None, size: int
    ) -> None:
        """Checks and records a read."""
        warps, own = self._warps_of(state, lanes)
        units = self.units(bytes_at, size)
        bad = self.write_clock[units] > self.clocks[warps[:, None], self.writer[units]]
        if bad.any():
            self._fault_write(state, ins, a, lanes, units, bad, own, "read")
        self.read_clock[units, own[:, None]] = self.clocks[warps, own][:, None]

    def check_write(
        self, state: State, ins: Instr, a: Array, bytes_at: Array, lanes: Array | None, size: int,
        view: Array | None = None, values: Array | None = None, atomic: bool = False,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Checks and records a write; returns the units and the warps within their CTAs.

        With `view` and `values`, an equal value that is there already is no race.
        """
        warps, own = self._warps_of(state, lanes)
        units = self.units(bytes_at, size)
        bad = self.write_clock[units] > self.clocks[warps[:, None], self.writer[units]]
        if atomic:
            bad &= ~self.by_atomic[units]
        if bad.any() and values is not None:
            same = view[bytes_at >> LOG2[size]] == values
            same = same if same.ndim == 1 else same.all(1)
            bad &= ~same[:, None]
        if bad.any():
            verb = "atomic access" if atomic else "write"
            self._fault_write(state, ins, a, lanes, units, bad, own, verb)
        late = self.read_clock[units] > self.clocks[warps][:, None, :]
        if late.any():
            k = int(np.argmax(late.any((1, 2))))
            reader = int(np.argmax(late[k].any(0)))
            message = (
                f"shared offset {int(a[k]):#x}: warp {int(own[k])} writes what warp {reader} read "
                "with no barrier between"
            )
            state.fault(RaceError, message, ins, lanes, k)
        clock = self.clocks[warps, own][:, None]
        self.record_write(units, own[:, None], clock, ins.line, atomic)
        return units, own

    def _fault_write(
        self, state: State, ins: Instr, a: Array, lanes: Array | None, units: Array, bad: Array,
        own: Array, verb: str,
    ) -> None:  # fmt: skip
        k = int(np.argmax(bad.any(1)))
        unit = units[k, int(np.argmax(bad[k]))]
        message = (
            f"shared offset {int(a[k]):#x}: {verb} by warp {int(own[k])} of bytes written by warp "
            f"{int(self.writer[unit])} at PTX line {int(self.write_line[unit])} "
            "with no barrier between"
        )
        state.fault(RaceError, message, ins, lanes, k)

    def check_same_step(
        self, state: State, ins: Instr, a: Array, lanes: Array | None,
        units: Array, own: Array, same: Array,
    ) -> None:  # fmt: skip
        """Finds warps that write different values to the same bytes in one step."""
        clash = self.writer[units] != own[:, None]
        if not clash.any():
            return
        same = same if same.ndim == 1 else same.all(1)
        rows = clash.any(1) & ~same
        if rows.any():
            k = int(np.argmax(rows))
            message = (
                f"shared offset {int(a[k]):#x}: warps {int(own[k])} and "
                f"{int(self.writer[units[k]].max())} write different values in the same step"
            )
            state.fault(RaceError, message, ins, lanes, k)

    def check_fence(
        self, state: State, ins: Instr, a: Array, bytes_at: Array, lanes: Array, copies: bool
    ) -> None:
        """Checks that the asynchronous proxy sees what it is about to read, 16 bytes each.

        `copies` says whether writes by cp.async count.
        """
        warps = state.warp_of[lanes]
        units = self.units(bytes_at, 16)
        bad = self.write_clock[units] > self.fenced[warps[:, None], self.writer[units]]
        if not copies:
            bad &= ~self.by_copy[units]
        if bad.any():
            k = int(np.argmax(bad.any(1)))
            unit = units[k, int(np.argmax(bad[k]))]
            message = (
                f"{ins.parts[0]} reads shared bytes at offset {int(a[k]):#x}, which warp "
                f"{int(self.writer[unit])} wrote at PTX line {int(self.write_line[unit])}, "
                "with no fence.proxy.async since"
            )
            state.fault(MissingFenceError, message, ins, lanes, k)
