# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles mma, a matrix product by a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import full, put
from ..ptx_types import WIDTH, Array, f16, f32, f64, i8, i32, i64, u8, u16, u32, u64
from ..syntax.elements import items

EXTENTS = {
    "m16n8k4": (16, 8, 4),
    "m16n8k8": (16, 8, 8),
    "m16n8k16": (16, 8, 16),
    "m16n8k32": (16, 8, 32),
    "m8n8k4": (8, 8, 4),
}
# type -> elements in a register of an operand
ELEMENTS = {"bf16": 2, "f16": 2, "tf32": 1, "f64": 1, "s8": 4, "u8": 4}
OTHER_TYPES = ("tf32", "s4", "u4", "b1", "e4m3", "e5m2")
ACCUMULATORS = ("f32", "f16", "s32", "f64")


class Shape(NamedTuple):
    """Describes a product: extents, types of the operands and of the accumulator."""

    m: int
    n: int
    k: int
    a: str
    b: str
    acc: str
    saturate: bool

    @property
    def rows(self) -> int:
        """Returns the number of blocks of eight rows."""
        return self.m // 8

    @property
    def registers_k(self) -> int:
        """Returns the number of registers along K."""
        return self.k // (4 * ELEMENTS[self.a])


def shape_of(ins: Instr) -> Shape:
    """Returns the product that an instruction names."""
    parts = ins.parts
    if "row" not in parts or any(p.startswith(("sp", "kind", "block_scale")) for p in parts):
        raise unsupported(ins)
    name = parts[3]
    types = [p for p in parts[4:] if p in WIDTH or p in OTHER_TYPES]
    if len(types) != 4:
        raise unsupported(ins)
    out, a, b, acc = types
    if name not in EXTENTS or a not in ELEMENTS or b not in ELEMENTS:
        raise unsupported(ins)
    if name == "m8n8k4" and a != "f64":
        raise unsupported(ins)
    if out != acc or acc not in ACCUMULATORS:
        raise unsupported(ins, "accumulator types")
    return Shape(*EXTENTS[name], a, b, acc, "satfinite" in parts)


def unpack(state: State, register: Array, kind: str) -> list[Array]:
    """Returns the elements of a fragment register, each (warps, 8, 4)."""
    u = np.ascontiguousarray(full(state, register)).reshape(-1, 8, 4)
    if kind == "bf16":
        return [(u << u32(16)).view(f32), (u & u32(0xFFFF0000)).view(f32)]
    if kind == "f16":
        halves = u.view(u16).reshape(*u.shape, 2).view(f16).astype(f32)
        return [halves[..., 0], halves[..., 1]]
    if kind == "tf32":
        return [(u & u32(0xFFFFE000)).view(f32)]
    if kind == "f64":
        return [u.view(f64)]
    element = {"s8": i8, "u8": u8}[kind]
    elements = u.view(element).reshape(*u.shape, 4)
    return [elements[..., k] for k in range(4)]


def _operand_a(state: State, slots: Sequence[int], shape: Shape) -> Array:
    """Returns A as (warps, M, K)."""
    regs = [state.regs[s] for s in slots]
    key = ("a", shape.a, *map(id, regs))
    hit = state.fragments.get(key)
    if hit is None:
        per, rows = ELEMENTS[shape.a], shape.rows
        out = np.empty((state.n_warps, rows, 8, 4, shape.registers_k * per), f64)
        for i, register in enumerate(regs):
            for e, value in enumerate(unpack(state, register, shape.a)):
                out[:, i % rows, :, :, (i // rows) * per + e] = value
        value = out.reshape(state.n_warps, shape.m, shape.k)
        hit = state.keep_fragment(key, regs, value)
    return hit[1]


def _operand_b(state: State, slots: Sequence[int], shape: Shape) -> Array:
    """Returns B as (warps, K, N)."""
    regs = [state.regs[s] for s in slots]
    key = ("b", shape.b, *map(id, regs))
    hit = state.fragments.get(key)
    if hit is None:
        per = ELEMENTS[shape.a]
        out = np.empty((state.n_warps, 8, 4, shape.registers_k * per), f64)
        for i, register in enumerate(regs):
            for e, value in enumerate(unpack(state, register, shape.b)):
                out[:, :, :, i * per + e] = value
        value = out.reshape(state.n_warps, shape.n, shape.k).transpose(0, 2, 1)
        hit = state.keep_fragment(key, regs, value)
    return hit[1]


def compile_mma(program: Program, ins: Instr) -> Step:
    """Compiles mma."""
    shape = shape_of(ins)
    d, a, b, c = (items(o) for o in ins.args[:4])
    operand = "b64" if shape.a == "f64" else "b32"
    slots_a = [program.src(x, operand, ins) for x in a]
    slots_b = [program.src(x, operand, ins) for x in b]
    accumulator = "b64" if shape.acc == "f64" else "b32"
    slots_c = [program.src(x, accumulator, ins) for x in c]
    slots_d = [program.dst(x) for x in d]
    n_acc = shape.rows * (1 if shape.acc == "f16" else 2)
    n_a, n_b = shape.rows * shape.registers_k, shape.registers_k
    if [len(x) for x in (a, b, c, d)] != [n_a, n_b, n_acc, n_acc]:
        raise unsupported(ins, "fragment sizes")
    add = _add_halves if shape.acc == "f16" else _adder(shape)
    flops = 2 * shape.m * shape.n * shape.k

    def step(state: State) -> None:
        x, y = _operand_a(state, slots_a, shape), _operand_b(state, slots_b, shape)
        product = np.matmul(x, y).reshape(state.n_warps, shape.rows, 8, 4, 2)
        warps = state.n_warps
        if state.mask is not None:
            warps = int(state.mask.reshape(-1, 32)[:, 0].sum())
        state.mma_flops += flops * warps
        product = product.transpose(1, 4, 0, 2, 3).reshape(shape.rows, 2, state.n_lanes)
        sums = add(product, [state.regs[s] for s in slots_c])
        for slot, value in zip(slots_d, sums, strict=True):
            put(state, slot, value)

    return step


def _add_halves(product: Array, c: Sequence[Array]) -> list[Array]:
    """Adds accumulators that are pairs of f16."""
    sums = []
    for register, pair in zip(c, product, strict=True):
        halves = np.ascontiguousarray(register).view(f16).reshape(-1, 2).astype(f64)
        total = np.empty((product.shape[-1], 2), f16)
        total[:, 0] = pair[0] + halves[:, 0]
        total[:, 1] = pair[1] + halves[:, 1]
        sums.append(total.view(u32).reshape(-1))
    return sums


def _adder(shape: Shape) -> Callable[[Array, Sequence[Array]], list[Array]]:
    """Returns what adds accumulators of one number each, rounding once."""

    def one(product: Array, c: Array) -> Array:
        if shape.acc == "f32":
            return (product + c.view(f32)).astype(f32).view(u32)
        if shape.acc == "f64":
            return (product + c.view(f64)).view(u64)
        total = product.astype(i64) + c.view(i32)
        if shape.saturate:
            total = np.clip(total, -(2**31), 2**31 - 1)
        return (total & i64(0xFFFFFFFF)).astype(u32)

    def add(product: Array, c: Sequence[Array]) -> list[Array]:
        flat = product.reshape(-1, product.shape[-1])
        return [one(p, register) for p, register in zip(flat, c, strict=True)]

    return add
