# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles atom and red. The lanes of an instruction take their turns in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import floats
from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import extend_to, put_active
from ..ptx_types import DT, HALVES, LOG2, PAIRS, TYPE_SIZE, UDT, Array, f16, f32, u8, u16
from ..syntax.elements import SINK, items
from .addressing import accessor, vec_of
from .global_memory import as_u64, locate_global, note_global
from .load_store import value_getter

# what remains in memory, of what is there, the operand, and the second operand of cas
Update = Callable[[Array, Array, Array | None], Array]

UPDATES: dict[str, Update] = {
    "add": lambda a, b, c: a + b,
    "min": lambda a, b, c: np.minimum(a, b),
    "max": lambda a, b, c: np.maximum(a, b),
    "and": lambda a, b, c: a & b,
    "or": lambda a, b, c: a | b,
    "xor": lambda a, b, c: a ^ b,
    "exch": lambda a, b, c: b,
    "cas": lambda a, b, c: np.where(a == b, c, a),
    "inc": lambda a, b, c: np.where(a >= b, a.dtype.type(0), a + a.dtype.type(1)),
    "dec": lambda a, b, c: np.where((a == 0) | (a > b), b, a - a.dtype.type(1)),
}
# functions that numpy can apply to repeated indices
REPEATABLE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
HALF_UPDATES = {"add": np.add, "min": np.fmin, "max": np.fmax}


def half_update(op: str, ty: str) -> Update:
    """Returns an update of f16 or bf16 numbers or pairs, computed in f32."""
    bf = ty.startswith("bf")

    def values(bits: Array) -> Array:
        bits = np.ascontiguousarray(bits).view(u16)
        return floats.bf16_to_f32(bits) if bf else bits.view(f16).astype(f32)

    def update(a: Array, b: Array, c: Array | None) -> Array:
        result = HALF_UPDATES[op](values(a), values(b))
        bits = floats.f32_to_bf16(result) if bf else result.astype(f16).view(u16)
        return np.ascontiguousarray(bits).view(a.dtype).reshape(a.shape)

    return update


@dataclass
class Atomic:
    """Describes an atomic operation on elements of a type."""

    ins: Instr
    op: str
    ty: str
    update: Update
    wants_old: bool

    def apply(self, view: Array, index: Array, b: Array, c: Array | None) -> Array | None:
        """Updates elements in the order of the lanes; returns what was there, where wanted."""
        half = self.ty in HALVES or self.ty in PAIRS
        if not self.wants_old and self.op in REPEATABLE and not half:
            REPEATABLE[self.op].at(view, index, b)
            return None
        order = np.argsort(index, kind="stable")
        first = np.ones(len(index), bool)
        first[1:] = index[order][1:] != index[order][:-1]
        start = np.flatnonzero(first)
        segment = np.cumsum(first) - 1  # number of the element, by position in `order`
        rank = np.arange(len(index)) - start[segment]  # turn among the lanes of one element
        if self.op == "add" and view.dtype.kind in "ui" and rank.max() > 4 and not half:
            return _add_in_order(view, index, b, order, start[segment])
        return self._by_turns(view, index, b, c, order, rank)

    def _by_turns(
        self, view: Array, index: Array, b: Array, c: Array | None, order: Array, rank: Array
    ) -> Array:
        old = np.empty(len(index), view.dtype)
        top = int(rank.max())
        by_rank = np.argsort(rank, kind="stable")
        bounds = np.searchsorted(rank[by_rank], np.arange(top + 2))
        for turn in range(top + 1):
            lanes = order[by_rank[bounds[turn] : bounds[turn + 1]]]
            current = view[index[lanes]]
            old[lanes] = current
            view[index[lanes]] = self.update(current, b[lanes], None if c is None else c[lanes])
        return old


def _add_in_order(view: Array, index: Array, b: Array, order: Array, start: Array) -> Array:
    """Adds integers; returns what each lane found, from prefix sums."""
    old = np.empty(len(index), view.dtype)
    before = np.cumsum(b[order], dtype=view.dtype) - b[order]
    old[order] = view[index[order]] + (before - before[start])
    np.add.at(view, index, b)
    return old


def atomic_of(ins: Instr, wants_old: bool) -> Atomic:
    """Returns the operation that an opcode names."""
    parts = ins.parts
    ty = parts[-1]
    op = next((p for p in parts[1:] if p in UPDATES), None)
    half = ty in HALVES or ty in PAIRS
    unknown = ty not in DT or (half and op not in HALF_UPDATES)
    if unknown or op is None or "async" in parts or "bulk" in parts:
        raise unsupported(ins)
    return Atomic(ins, op, ty, half_update(op, ty) if half else UPDATES[op], wants_old)


def compile_atom(program: Program, ins: Instr) -> Step:
    """Compiles atom, and red, which wants no result."""
    args = list(ins.args)
    dst = None if ins.parts[0] == "red" else args.pop(0)
    mem = args.pop(0)
    wanted = () if dst is None or dst == SINK else items(dst)
    atomic = atomic_of(ins, bool(wanted))
    ty, vector = atomic.ty, vec_of(ins.parts)
    targets = [(program.dst(item), program.width(item)) for item in wanted]
    operands = [value_getter(program, ins, item, ty) for item in items(args[0])]
    swap = value_getter(program, ins, args[1], ty) if atomic.op == "cas" else None
    register = UDT[max(16, TYPE_SIZE[ty] * 8)] if TYPE_SIZE[ty] > 1 else u8

    def access(state: State, space: str, a: Array) -> None:
        state.spin += 1 if targets else 0
        values = [get(state).view(DT[ty]) for get in operands]
        other = swap(state).view(DT[ty]) if swap else None
        if space == "global":
            olds = _on_global(state, atomic, a, values, other, vector)
        elif space == "shared":
            olds = [_on_shared(state, atomic, a, values[0], other)]
        else:
            raise unsupported(ins, f"atomic on {space} memory")
        for (slot, width), old in zip(targets, olds, strict=False):
            put_active(state, slot, extend_to(old.view(register), width))

    return accessor(program, ins, mem, access)


def _on_global(
    state: State, atomic: Atomic, a: Array, values: list[Array], other: Array | None, vector: int
) -> list[Array]:
    a = as_u64(a)
    dt, size = DT[atomic.ty], TYPE_SIZE[atomic.ty]
    pieces = locate_global(state, atomic.ins, a, size * vector, True)
    if state.want_stats:
        note_global(state, a, size * vector, "atomic", pieces)
    olds = []
    for k, value in enumerate(values):
        old = np.empty(len(a), dt)
        for selected, alloc, index, shift in pieces:
            own = slice(None) if selected is None else selected
            first = -alloc.base % size
            element = (index * size * vector + shift + k * size - first) // size
            c = None if other is None else other[own]
            found = atomic.apply(alloc.view(size, first).view(dt), element, value[own], c)
            if found is not None:
                old[own] = found
        olds.append(old)
    return olds


def _on_shared(
    state: State, atomic: Atomic, a: Array, value: Array, other: Array | None
) -> Array | None:
    dt, size = DT[atomic.ty], TYPE_SIZE[atomic.ty]
    lanes = state.lanes_or_none()
    if state.want_stats:
        state.note_shared("atom.shared", a, lanes, size)
    index = state.shared.locate(state, atomic.ins, a, lanes, size, "a")
    old = atomic.apply(state.shared.views[size].view(dt), index, value, other)
    state.shared.mark_valid(index << LOG2[size], size)
    return old
