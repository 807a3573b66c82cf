# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the shared memory of a batch of CTAs, with its checks and its bank model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..compiling import Instr, State
from ..errors import (
    AsyncCopyError,
    AsyncMmaError,
    MisalignedError,
    OutOfBoundsError,
    UninitialisedSharedError,
)
from ..ptx_types import ELEM, LOG2, Array, align_up, i64, u8, u16, u32, u64
from .banks import BankModel
from .races import SIZES, RaceTracker

if TYPE_CHECKING:
    from ..machine.checks import Checks

# kinds of accesses
READ, WRITE, ATOMIC, COPY = "rwac"
DURING_COPY = {
    READ: "read of",
    WRITE: "write to",
    ATOMIC: "atomic on",
    COPY: "second cp.async into",
}
DURING_READ = {WRITE: "write to", ATOMIC: "atomic on", COPY: "cp.async into"}


class Shared(RaceTracker):
    """Holds bytes, and marks of copies and wgmma in flight and of bytes that were written.

    A read by a wgmma is one by its four warps, at the wait. Until then nothing may write the bytes.
    """

    def __init__(
        self,
        n_cta: int,
        size: int,
        warps: int,
        checks: Checks,
        granularity: int,
        cta_lanes: int,
    ) -> None:
        stride = max(16, align_up(size, 16))
        total = n_cta * stride
        super().__init__(n_cta, total, warps, checks.race, granularity)
        self.size, self.checks = size, checks
        self.banks = BankModel()
        memory = np.full(total, 0xFF, u8)
        self.views: dict[int, Array] = {n: memory.view(ELEM[n]) for n in SIZES}
        self.base = np.repeat(np.arange(n_cta, dtype=i64) * stride, cta_lanes)  # by lane
        # copies in flight into each 4 bytes
        self.n_arriving = 0
        arriving = np.zeros(total // 4, u8)
        self.arriving: dict[int, Array] = {
            4: arriving,
            8: arriving.view(u16),
            16: arriving.view(u32),
        }
        # products and copies in flight that read each 16 bytes
        self.n_being_read = 0
        self.being_read = np.zeros(total // 16, u16)
        self.written = np.zeros(total, u8) if checks.uninit_shared else None

    # -- checks
    def locate(
        self, state: State, ins: Instr, addresses: Array, lanes: Array | None, size: int, kind: str
    ) -> Array:
        """Checks an access and returns indices of elements of its size."""
        a = addresses.astype(i64)
        if len(a) == 0:
            return a
        self._check_bounds(state, ins, a, lanes, size)
        bytes_at = a + (self.base if lanes is None else self.base[lanes])
        if self.checks.async_pending:
            self._check_in_flight(state, ins, a, bytes_at, lanes, size, kind)
        if self.written is not None:
            self._check_written(state, ins, a, bytes_at, lanes, size, kind)
        if self.race and kind == READ:
            self.check_read(state, ins, a, bytes_at, lanes, size)
        elif self.race and kind == ATOMIC:
            self.check_write(state, ins, a, bytes_at, lanes, size, atomic=True)
        return bytes_at >> LOG2[size]

    def _check_bounds(
        self, state: State, ins: Instr, a: Array, lanes: Array | None, size: int
    ) -> None:
        if int(a.min()) < 0 or int(a.max()) + size > self.size:
            k = int(np.argmax((a < 0) | (a + size > self.size)))
            message = (
                f"shared access of {size} bytes at offset {int(a[k]):#x}, "
                f"the CTA has {self.size} bytes"
            )
            state.fault(OutOfBoundsError, message, ins, lanes, k)
        if size > 1 and (a & (size - 1)).any():
            k = int(np.argmax((a & (size - 1)) != 0))
            message = f"shared access of {size} bytes at offset {int(a[k]):#x}"
            state.fault(MisalignedError, message, ins, lanes, k)

    def _check_in_flight(
        self, state: State, ins: Instr, a: Array, bytes_at: Array, lanes: Array | None, size: int,
        kind: str,
    ) -> None:  # fmt: skip
        if self.n_arriving:
            unit = max(4, size)
            pending = self.arriving[unit][bytes_at >> LOG2[unit]]
            if pending.any():
                k = int(np.argmax(pending != 0))
                message = (
                    f"{DURING_COPY[kind]} shared bytes at offset {int(a[k]):#x} while a cp.async "
                    "into them is still in flight (no wait_group, wait_all or mbarrier covers it "
                    "yet)"
                )
                state.fault(AsyncCopyError, message, ins, lanes, k)
        if self.n_being_read and kind != READ:
            pending = self.being_read[bytes_at >> 4]
            if pending.any():
                k = int(np.argmax(pending != 0))
                message = (
                    f"{DURING_READ[kind]} shared bytes at offset {int(a[k]):#x} while a wgmma or "
                    "bulk copy that reads them is still in flight (no wait_group covers it yet)"
                )
                state.fault(AsyncMmaError, message, ins, lanes, k)

    def _check_written(
        self, state: State, ins: Instr, a: Array, bytes_at: Array, lanes: Array | None, size: int,
        kind: str,
    ) -> None:  # fmt: skip
        if kind == WRITE:
            self.mark_valid(bytes_at, size)
        if kind not in (READ, ATOMIC):
            return
        bad = (self.written.reshape(-1, size)[bytes_at >> LOG2[size]] != 0xFF).any(1)
        if bad.any():
            k = int(np.argmax(bad))
            message = (
                f"read of {size} shared bytes at offset {int(a[k]):#x} that were never written"
            )
            state.fault(UninitialisedSharedError, message, ins, lanes, k)

    def mark_valid(self, bytes_at: Array, size: int) -> None:
        """Marks bytes as written."""
        if self.written is not None:
            self.written.reshape(-1, size)[bytes_at >> LOG2[size]] = 0xFF

    # -- loads and stores
    def load(
        self, state: State, ins: Instr, addresses: Array, lanes: Array | None, size: int
    ) -> Array:
        """Loads one element for each lane."""
        return self.views[size][self.locate(state, ins, addresses, lanes, size, READ)]

    def store(
        self, state: State, ins: Instr, addresses: Array, lanes: Array | None, size: int,
        values: Array,
    ) -> None:  # fmt: skip
        """Stores one element for each lane."""
        index = self.locate(state, ins, addresses, lanes, size, WRITE)
        if not self.race or not len(index):
            self.views[size][index] = values
            return
        # 16 bytes compare as bits, since NaN does not equal itself
        view, bits = self.views[size], values
        if size == 16:
            view = view.view(u64).reshape(-1, 2)
            bits = np.ascontiguousarray(values).view(u64).reshape(-1, 2)
        a, bytes_at = addresses.astype(i64), index << LOG2[size]
        units, own = self.check_write(state, ins, a, bytes_at, lanes, size, view, bits)
        self.views[size][index] = values
        self.check_same_step(state, ins, a, lanes, units, own, view[index] == bits)

    def plain_write(
        self, state: State, ins: Instr, addresses: Array, lanes: Array | None, size: int
    ) -> Array:
        """Checks a write whose values are not compared; returns indices of elements."""
        index = self.locate(state, ins, addresses, lanes, size, WRITE)
        if self.race and len(index):
            bytes_at = index << LOG2[size]
            self.check_write(state, ins, addresses.astype(i64), bytes_at, lanes, size)
        return index

    # -- copies into shared memory
    def begin_async(
        self, state: State, ins: Instr, addresses: Array, lanes: Array | None, size: int
    ) -> Array:
        """Notes that a copy is on its way. Until it lands its destination is undefined."""
        index = self.locate(state, ins, addresses, lanes, size, COPY)
        if self.race and len(index):
            bytes_at = index << LOG2[size]
            self.check_write(state, ins, addresses.astype(i64), bytes_at, lanes, size)
        if self.checks.async_poison:
            self.views[size][index] = np.full(size, 0xFF, u8).view(ELEM[size])[0]
        arriving = self.arriving[size]
        arriving[index] = np.full(size // 4, 1, u8).view(arriving.dtype)[0]
        self.n_arriving += len(index)
        return index

    def _land(self, index: Array, size: int, data: Array) -> None:
        self.views[size][index] = data
        self.arriving[size][index] = 0
        self.n_arriving -= len(index)
        self.mark_valid(index << LOG2[size], size)

    def land_async(
        self, state: State, index: Array, lanes: Array, size: int, data: Array, line: int
    ) -> None:
        """Lets a cp.async of these lanes arrive."""
        self._land(index, size, data)
        if self.race:
            warps, own = self._warps_of(state, lanes)
            clock = self.clocks[warps, own][:, None]
            units = self.units(index << LOG2[size], size)
            self.record_write(units, own[:, None], clock, line, copy=True)

    def land_bulk(self, index: Array, data: Array, warp: int, clock: int, line: int) -> None:
        """Lets a bulk copy arrive that `warp` issued at `clock`."""
        self._land(index, 16, data)
        if self.race:
            self.record_write(self.units(index << 4, 16), warp % self.warps, clock, line)

    # -- reads by wgmma and by copies to global memory
    def _begin_read(self, index: Array) -> None:
        if self.checks.async_pending:
            np.add.at(self.being_read, index.reshape(-1), 1)
            self.n_being_read += index.size

    def _end_read(self, index: Array) -> None:
        if self.checks.async_pending:
            np.subtract.at(self.being_read, index.reshape(-1), 1)
            self.n_being_read -= index.size

    def _check_proxy(self, state: State, ins: Instr, a: Array, index: Array, lanes: Array) -> None:
        if self.race and self.checks.proxy_fence:
            self.check_fence(state, ins, a, index << 4, lanes, self.checks.copy_fence)

    def begin_mma_read(self, state: State, ins: Instr, addresses: Array) -> tuple[Array, Array]:
        """Returns indices and data of the operands of a product.

        `addresses` are offsets of 16-byte chunks for each active warpgroup.
        """
        groups, n = addresses.shape
        # one lane for each warp, since every warp reads everything
        warps = state.lanes().reshape(groups, 4, 32)[:, :, :1]
        readers = 4 if self.race else 1
        lanes = np.broadcast_to(warps[:, :readers], (groups, readers, n)).reshape(-1)
        a = np.broadcast_to(addresses[:, None], (groups, readers, n)).reshape(-1)
        index = self.locate(state, ins, a, lanes, 16, READ)
        self._check_proxy(state, ins, a, index, lanes)
        index = index.reshape(groups, readers, n)[:, 0]
        self._begin_read(index)
        return index, self.views[16][index]

    def end_mma_read(self, state: State, first: Array, index: Array) -> None:
        """Notes that the warpgroups that start at these lanes have waited for their products."""
        self._end_read(index)
        if self.race:
            units = self.units(index.reshape(-1) << 4, 16).reshape(len(index), -1)
            warps = state.warp_of[first][:, None] + np.arange(4)
            own = warps % self.warps
            self.read_clock[units[:, :, None], own[:, None, :]] = self.clocks[warps, own][
                :, None, :
            ]

    def begin_bulk_read(self, state: State, ins: Instr, addresses: Array, lanes: Array) -> Array:
        """Returns indices of the source of a bulk copy to global memory."""
        index = self.locate(state, ins, addresses, lanes, 16, READ)
        self._check_proxy(state, ins, addresses, index, lanes)
        self._begin_read(index)
        return index

    def end_bulk_read(self, state: State, lane: int, index: Array) -> None:
        """Notes that a lane has waited for its bulk copy."""
        self._end_read(index)
        if self.race:
            warp = state.warp_of[lane]
            own = warp % self.warps
            self.read_clock[self.units(index << 4, 16), own] = self.clocks[warp, own]
