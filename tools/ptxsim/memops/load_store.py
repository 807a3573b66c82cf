# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles ld and st."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import active, extend_to, put, put_active
from ..ptx_types import DT, ELEM, TYPE_SIZE, Array, u8
from ..syntax.elements import SINK, Operand, Sym, items
from .addressing import accessor, space_of, vec_of
from .windows import load_from, store_to

WIDEST = 16  # bytes that one access to memory moves
POLLING = {"volatile", "acquire", "relaxed", "mmio"}


def element_type(ins: Instr) -> str:
    """Returns the type of what an instruction moves."""
    ty = ins.parts[-1]
    if ty == "b128" or ty not in DT:
        raise unsupported(ins)
    return ty


def columns(raw: Array, size: int, vector: int) -> list[Array]:
    """Splits loaded vectors into one array for each element."""
    if vector == 1:
        return [raw]
    table = raw.view(ELEM[size]).reshape(len(raw), vector)
    return [np.ascontiguousarray(table[:, k]) for k in range(vector)]


def interleaved(values: Sequence[Array]) -> Array:
    """Joins one array for each element into vectors."""
    if len(values) == 1:
        return values[0]
    table = np.empty((len(values[0]), len(values)), values[0].dtype)
    for k, value in enumerate(values):
        table[:, k] = value
    return table.view(ELEM[values[0].itemsize * len(values)]).reshape(-1)


def compile_ld(program: Program, ins: Instr) -> Step:
    """Compiles a load."""
    ty = element_type(ins)
    size, vector = TYPE_SIZE[ty], vec_of(ins.parts)
    dst, mem = ins.args[0], ins.args[1]
    slots = [None if item == SINK else program.dst(item) for item in items(dst)]
    widths = [None if item == SINK else program.width(item) for item in items(dst)]

    def extended(value: Array, width: int | None) -> Array:
        if width is None or value.dtype.itemsize * 8 == width:
            return value
        return extend_to(value.view(DT[ty]) if ty[0] == "s" else value, width)

    targets = list(zip(slots, widths, strict=True))
    if space_of(ins.parts) == "param":
        read = _param_reader(program, ins, size)
        if read is not None:
            return _load_param(targets, read, extended)
    polls = 1 if POLLING & set(ins.parts) else 0

    def access(state: State, space: str, a: Array) -> None:
        state.spin += polls
        if size * vector <= WIDEST:
            values = columns(load_from(state, ins, space, a, size * vector), size, vector)
        else:
            values = []
            for start in (0, WIDEST):
                raw = load_from(state, ins, space, a + a.dtype.type(start), WIDEST)
                values += columns(raw, size, vector // 2)
        for (slot, width), value in zip(targets, values, strict=True):
            if slot is not None:
                put_active(state, slot, extended(value, width))

    return accessor(program, ins, mem, access)


ParamReader = Callable[[State, int], Array]  # state, number of the element


def _param_reader(program: Program, ins: Instr, size: int) -> ParamReader | None:
    """Returns what reads a parameter that the address names, None when a register holds it."""
    mem = ins.args[1]
    buffer = program.param_buffer(mem)
    if buffer is not None:  # a per-lane parameter of a device function
        number, offset = buffer

        def from_buffer(state: State, k: int) -> Array:
            raw = state.buffers[number][:, offset + k * size : offset + (k + 1) * size]
            return np.ascontiguousarray(raw).view(ELEM[size]).reshape(-1)

        return from_buffer
    if not isinstance(mem.base, Sym):
        return None
    start = program.symbol(mem.base.name, ins)[1] + mem.offset + mem.base.offset

    def from_kernel(state: State, k: int) -> Array:
        at = start + k * size
        return state.params_padded[at : at + size].view(ELEM[size])

    return from_kernel


def _load_param(
    targets: Sequence[tuple[int | None, int | None]],
    read: ParamReader,
    extended: Callable[[Array, int | None], Array],
) -> Step:
    def step(state: State) -> None:
        for k, (slot, width) in enumerate(targets):
            if slot is not None:
                put(state, slot, extended(read(state, k), width))

    return step


def value_getter(
    program: Program, ins: Instr, operand: Operand, ty: str
) -> Callable[[State], Array]:
    """Returns what reads an operand of the active lanes as raw elements of the type's size."""
    slot = program.src(operand, ty, ins)
    element = ELEM[TYPE_SIZE[ty]]

    def get(state: State) -> Array:
        value = active(state, state.regs[slot])
        return value if value.dtype == element else value.astype(element)

    return get


def compile_st(program: Program, ins: Instr) -> Step:
    """Compiles a store."""
    ty = element_type(ins)
    size, vector = TYPE_SIZE[ty], vec_of(ins.parts)
    mem, source = ins.args[0], ins.args[1]
    if space_of(ins.parts) == "param":
        return _store_param(program, ins, ty)
    getters = [value_getter(program, ins, item, ty) for item in items(source)]

    def access(state: State, space: str, a: Array) -> None:
        values = [get(state) for get in getters]
        if size * vector <= WIDEST:
            store_to(state, ins, space, a, size * vector, interleaved(values))
            return
        half = vector // 2
        store_to(state, ins, space, a, WIDEST, interleaved(values[:half]))
        second = a + a.dtype.type(WIDEST)
        store_to(state, ins, space, second, WIDEST, interleaved(values[half:]))

    return accessor(program, ins, mem, access)


def _store_param(program: Program, ins: Instr, ty: str) -> Step:
    size = TYPE_SIZE[ty]
    found = program.param_buffer(ins.args[0])
    if found is None:
        raise unsupported(ins, "not a parameter of a device function")
    number, offset = found
    slots = [program.src(item, ty, ins) for item in items(ins.args[1])]
    element = ELEM[size]

    def step(state: State) -> None:
        buffer, mask = state.buffers[number], state.write_mask
        for k, slot in enumerate(slots):
            value = state.regs[slot]
            value = np.ascontiguousarray(value if value.dtype == element else value.astype(element))
            raw = value.view(u8).reshape(-1, size)
            part = buffer[:, offset + k * size : offset + (k + 1) * size]
            part[:] = raw if mask is None else np.where(mask[:, None], raw, part)

    return step
