# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps the wgmma products in flight, and checks what must not be touched meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..compiling import Instr, State
from ..errors import AsyncMmaError, MissingFenceError
from ..lanes import active, put, put_active
from ..ptx_types import Array, i32, u32
from .layouts import chunk_offsets

NAN_PATTERN = np.array([0x7FBADBAD], u32)


@dataclass
class Product:
    """Describes an issued product."""

    lanes: Array  # lanes that wait for it
    group: Array  # number of its group, by lane
    acc: Sequence[int]  # accumulator registers
    frag: Sequence[int]  # registers of A
    first: Array  # by warpgroup: its first lane
    index: Array  # by warpgroup: 16-byte units of shared memory that it reads


class ProductQueue:
    """Holds the products in flight of a batch of CTAs, and what their registers wait for."""

    def __init__(self, state: State) -> None:
        self.checks = state.checks
        self.products: list[Product] = []
        self.commits = np.zeros(state.n_lanes, i32)
        # accumulator -> lanes in flight, values to come
        self.values: dict[int, tuple[Array, Array]] = {}
        # register -> lanes for which it is in flight, in either role
        self.acc: dict[int, Array] = {}
        self.frag: dict[int, Array] = {}
        self.line: dict[int, int] = {}  # register -> PTX line of the last product that uses it
        self.fenced = np.zeros(state.n_lanes, bool)  # lanes that have executed a wgmma.fence
        self.touched: dict[int, Array] = {}  # register -> lanes that used it since their last fence
        self.shape: dict[int, str] = {}  # accumulator -> shape of products since the last fence
        self.layouts: dict[tuple[int, int, int], Array] = {}

    def chunks(self, descriptor: int, mn: int, mn_major: int) -> Array:
        """Returns the chunks of an operand, and remembers them."""
        key = (descriptor, mn, mn_major)
        if key not in self.layouts:
            self.layouts[key] = chunk_offsets(descriptor, mn, mn_major)
        return self.layouts[key]

    # -- checks
    def touch(self, state: State, ins: Instr, slots: Sequence[int]) -> None:
        """Notes that another instruction reads or writes registers of some wgmma."""
        mask = state.active_mask()
        for s in slots:
            if self.checks.async_pending:
                self._check_touch(state, ins, s, mask)
            if state.mask is None or s not in self.touched:
                self.touched[s] = mask
            else:
                self.touched[s] = self.touched[s] | mask

    def _check_touch(self, state: State, ins: Instr, slot: int, mask: Array) -> None:
        for role, pending in (("accumulator", self.acc), ("A operand", self.frag)):
            if slot not in pending:
                continue
            early = pending[slot] & mask
            if early.any():
                message = (
                    f"access to an {role} register of the wgmma at PTX line {self.line[slot]}, "
                    "which no wgmma.wait_group has covered yet"
                )
                state.fault(AsyncMmaError, message, ins, None, int(np.argmax(early)))

    def check(
        self, state: State, ins: Instr, acc: Sequence[int], frag: Sequence[int], shape: str
    ) -> None:
        """Checks that the registers of a new product are ordered after what used them last."""
        mask = state.active_mask()
        if self.checks.mma_fence:
            self._check_fence(state, ins, acc, frag, mask)
            self._check_shapes(state, ins, acc, shape, mask)
        if not self.checks.async_pending:
            return
        for mine, others in ((acc, self.frag), (frag, self.acc)):
            for s in mine:
                if s in others and (others[s] & mask).any():
                    message = (
                        f"a register of the wgmma at PTX line {self.line[s]}, still in flight, "
                        "in another role"
                    )
                    lane = int(np.argmax(others[s] & mask))
                    state.fault(AsyncMmaError, message, ins, None, lane)

    def _check_fence(
        self, state: State, ins: Instr, acc: Sequence[int], frag: Sequence[int], mask: Array
    ) -> None:
        late = mask & ~self.fenced
        if late.any():
            message = "wgmma without a wgmma.fence before it"
            state.fault(MissingFenceError, message, ins, None, int(np.argmax(late)))
        for s in (*acc, *frag):
            if s not in self.touched:
                continue
            late = self.touched[s] & mask
            if late.any():
                message = (
                    "no wgmma.fence between this wgmma and an earlier access to its "
                    f"{'accumulator' if s in acc else 'A operand'} registers"
                )
                state.fault(MissingFenceError, message, ins, None, int(np.argmax(late)))

    def _check_shapes(
        self, state: State, ins: Instr, acc: Sequence[int], shape: str, mask: Array
    ) -> None:
        for s in acc:
            if self.shape.get(s, shape) != shape:
                message = (
                    f"no wgmma.fence between products of different shapes, {self.shape[s]} "
                    f"and {shape}, into the same accumulators"
                )
                state.fault(MissingFenceError, message, ins, None, int(np.argmax(mask)))

    # -- products
    def issue(
        self, state: State, ins: Instr, acc: Sequence[int], frag: Sequence[int], shape: str,
        index: Array,
    ) -> None:  # fmt: skip
        """Puts a product in flight."""
        mask = state.active_mask()
        first = state.lanes().reshape(-1, 128)[:, 0]
        self.products.append(Product(mask, self.commits, acc, frag, first, index))
        self._note_pending(acc, frag, mask)
        for s in (*acc, *frag):
            self.line[s] = ins.line
        for s in acc:
            self.shape[s] = shape

    def _note_pending(self, acc: Sequence[int], frag: Sequence[int], lanes: Array) -> None:
        for slots, pending in ((acc, self.acc), (frag, self.frag)):
            for s in slots:
                pending[s] = pending[s] | lanes if s in pending else lanes

    def read(self, state: State, slot: int) -> Array:
        """Returns an accumulator's values in the active lanes, those still in flight included."""
        value = active(state, state.regs[slot])
        if slot not in self.values:
            return value
        lanes, coming = self.values[slot]
        return np.where(active(state, lanes), active(state, coming), value)

    def write(self, state: State, slot: int, value: Array) -> None:
        """Keeps the values an accumulator will have; until then it holds a NaN."""
        if not self.checks.async_poison:
            put_active(state, slot, value)
            return
        lanes = state.all_true
        if state.mask is not None:
            nothing = np.zeros(state.n_lanes, bool), np.zeros(state.n_lanes, value.dtype)
            lanes, coming = self.values.get(slot, nothing)
            lanes, coming = lanes | state.mask, coming.copy()
            coming[state.active_lanes()] = value
            value = coming
        self.values[slot] = (lanes, value)
        put(state, slot, NAN_PATTERN)

    def fence(self, state: State) -> None:
        """Orders earlier accesses of the active lanes before their next products."""
        if state.mask is None:
            self.fenced = state.all_true
            self.touched.clear()
        else:
            self.fenced = self.fenced | state.mask
            self.touched = {s: lanes & ~state.mask for s, lanes in self.touched.items()}
        self.shape.clear()

    def commit(self, state: State) -> None:
        """Ends a group of products."""
        self.commits = self.commits + (1 if state.mask is None else state.mask)

    def wait(self, state: State, n: int) -> None:
        """Lets products land, all but those of the last n groups."""
        mask = state.active_mask()
        landed: dict[int, Array] = {}
        for product in self.products:
            done = product.lanes & mask & (product.group < self.commits - n)
            if not done.any():
                continue
            product.lanes = product.lanes & ~done
            groups = done[product.first]
            state.shared.end_mma_read(state, product.first[groups], product.index[groups])
            for s in product.acc:
                landed[s] = landed[s] | done if s in landed else done
        if not landed:
            return
        self.products = [product for product in self.products if product.lanes.any()]
        self.acc, self.frag = {}, {}
        for product in self.products:
            self._note_pending(product.acc, product.frag, product.lanes)
        for s, done in landed.items():
            if s in self.values:
                self._land(state, s, done)

    def _land(self, state: State, slot: int, done: Array) -> None:
        lanes, value = self.values[slot]
        if slot in self.acc:  # a later product into the same accumulator is still in flight
            done = done & ~self.acc[slot]
        state.regs[slot] = value if done.all() else np.where(done, value, state.regs[slot])
        lanes = lanes & ~done
        if lanes.any():
            self.values[slot] = (lanes, value)
        else:
            del self.values[slot]
