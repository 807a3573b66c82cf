# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles arithmetic on integers and floating-point numbers."""

from __future__ import annotations

import numpy as np

from .. import floats
from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import full, put
from ..ptx_types import (
    DT,
    HALVES,
    PAIRS,
    UDT,
    WIDE,
    WIDTH,
    Array,
    f32,
    i8,
    i16,
    i32,
    i64,
    is_float,
    u8,
    u16,
    u32,
)
from .closures import Function, elementwise, half_op, rounding, with_modifiers
from .comparisons import fmax, fmin
from .integers import idiv, mulhi

NEAREST = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
WORD = i64(0xFFFFFFFF)


def _unsigned(ty: str) -> str:
    return "u" + ty[1:]


def float_function(op: str, ins: Instr) -> Function:
    """Returns one of the four operations with the rounding and modifiers of an instruction."""
    ty, mode = ins.parts[-1], rounding(ins.parts)
    if mode == "rn":
        return with_modifiers(ins, NEAREST[op], ty)
    if ty == "f64":
        raise unsupported(ins, "directed rounding of f64")
    return with_modifiers(ins, lambda a, b: floats.arith32(op, a, b, mode), ty)


def compile_addsub(program: Program, ins: Instr) -> Step:
    """Compiles add and sub."""
    parts, ty, op = ins.parts, ins.parts[-1], ins.parts[0]
    if ty in HALVES or ty in PAIRS:
        return half_op(program, ins, ty, NEAREST[op], 2, sat="sat" in parts)
    if ty in ("f32", "f64"):
        return elementwise(program, ins, ty, float_function(op, ins), 2)
    if "cc" in parts:
        return compile_carry(program, ins)
    if "sat" in parts:
        sign = 1 if op == "add" else -1

        def saturating(a: Array, b: Array) -> Array:
            return np.clip(a.astype(i64) + sign * b.astype(i64), -(2**31), 2**31 - 1).astype(i32)

        return elementwise(program, ins, "s32", saturating, 2)
    if ty in ("u16x2", "s16x2"):
        raise unsupported(ins)
    return elementwise(program, ins, _unsigned(ty) if ty[0] == "s" else ty, NEAREST[op], 2)


def compile_carry(program: Program, ins: Instr) -> Step:
    """Compiles add.cc, addc, sub.cc, subc, mad.cc and madc, whose carry lives in the state."""
    parts, ty, op = ins.parts, ins.parts[-1], ins.parts[0]
    ut = UDT[WIDTH[ty]]
    d = program.dst(ins.args[0])
    sources = [program.src(x, _unsigned(ty), ins) for x in ins.args[1:]]
    multiplies, takes_carry = op in ("mad", "madc"), op in ("addc", "subc", "madc")
    high = mulhi(ty if multiplies else _unsigned(ty)) if "hi" in parts else None

    def terms(values: list[Array]) -> list[Array]:
        if not multiplies:
            return values
        a, b, c = values
        if high is None:
            return [a * b, c]
        return [high(a.view(DT[ty]), b.view(DT[ty])).view(ut), c]

    def step(state: State) -> None:
        x, y = terms([state.regs[s] for s in sources])
        carry_in = state.carry.astype(ut) if takes_carry else ut(0)
        if op in ("sub", "subc"):
            partial = x - y
            result = partial - carry_in
            carry = (x < y) | (partial < carry_in)
        else:
            partial = x + y
            result = partial + carry_in
            carry = (partial < x) | (result < partial)
        if "cc" in parts:
            mask, carry = state.write_mask, full(state, carry)
            state.carry = carry if mask is None else np.where(mask, carry, state.carry)
        put(state, d, result)

    return step


def compile_mul(program: Program, ins: Instr) -> Step:
    """Compiles mul."""
    parts, ty = ins.parts, ins.parts[-1]
    if ty in HALVES or ty in PAIRS:
        return half_op(program, ins, ty, np.multiply, 2, sat="sat" in parts)
    if ty in ("f32", "f64"):
        return elementwise(program, ins, ty, float_function("mul", ins), 2)
    if "wide" in parts:
        wide, out = WIDE[ty]
        return elementwise(program, ins, ty, lambda a, b: a.astype(wide) * b.astype(wide), 2, out)
    if "hi" in parts:
        return elementwise(program, ins, ty, mulhi(ty), 2)
    return elementwise(program, ins, _unsigned(ty), np.multiply, 2)


def compile_mad(program: Program, ins: Instr) -> Step:
    """Compiles mad and madc."""
    parts, ty = ins.parts, ins.parts[-1]
    if ty in ("f32", "f64"):
        return compile_fma(program, ins)
    if "cc" in parts or parts[0] == "madc":
        return compile_carry(program, ins)
    if "sat" in parts:
        raise unsupported(ins)
    if "wide" in parts:
        wide, out = WIDE[ty]

        def product(a: Array, b: Array, c: Array) -> Array:
            return a.astype(wide) * b.astype(wide) + c

        return elementwise(program, ins, ty, product, 3, out, [ty, ty, out])
    if "hi" in parts:
        high = mulhi(ty)
        return elementwise(program, ins, ty, lambda a, b, c: high(a, b) + c, 3)
    return elementwise(program, ins, _unsigned(ty), lambda a, b, c: a * b + c, 3)


def compile_mul24(program: Program, ins: Instr) -> Step:
    """Compiles mul24 and mad24."""
    parts, ty = ins.parts, ins.parts[-1]
    shift = i64(16 if "hi" in parts else 0)

    def low24(x: Array) -> Array:
        x = x.astype(i64)
        return ((x << i64(40)) >> i64(40)) if ty == "s32" else x & i64(0xFFFFFF)

    def product(a: Array, b: Array, c: Array | None = None) -> Array:
        result = (low24(a) * low24(b)) >> shift
        if c is not None:
            result = result + c.astype(i64)
        return (result & WORD).astype(u32).view(DT[ty])

    return elementwise(program, ins, ty, product, 2 if parts[0] == "mul24" else 3)


def compile_fma(program: Program, ins: Instr) -> Step:
    """Compiles fma."""
    parts, ty = ins.parts, ins.parts[-1]
    mode = rounding(parts)
    if ty in HALVES or ty in PAIRS:
        relu, sat = "relu" in parts, "sat" in parts
        return half_op(program, ins, ty, lambda a, b, c: a * b + c, 3, relu, sat)
    if ty == "f32x2":
        raise unsupported(ins)
    if ty == "f32":
        fused = with_modifiers(ins, lambda a, b, c: floats.fma32(a, b, c, mode), ty)
        return elementwise(program, ins, ty, fused, 3)
    return elementwise(program, ins, ty, lambda a, b, c: floats.fma64(a, b, c, mode), 3)


def div_approx(a: Array, b: Array) -> Array:
    """Divides as div.approx does, which gives 0 for divisors above 2**126."""
    q = a / b
    big = (np.abs(b) > f32(2.0**126)) & np.isfinite(b)
    of_big = np.where(np.isinf(a) | np.isnan(a), f32(np.nan), np.copysign(f32(0), q))
    return np.where(big, of_big, q)


def compile_div(program: Program, ins: Instr) -> Step:
    """Compiles div."""
    ty = ins.parts[-1]
    if ty not in ("f32", "f64"):
        return elementwise(program, ins, ty, idiv(ty), 2)
    if "approx" in ins.parts:
        return elementwise(program, ins, ty, with_modifiers(ins, div_approx, ty), 2)
    return elementwise(program, ins, ty, float_function("div", ins), 2)


def compile_minmax(program: Program, ins: Instr) -> Step:
    """Compiles min and max."""
    parts, ty = ins.parts, ins.parts[-1]
    if "xorsign" in parts or len(ins.args) > 3:
        raise unsupported(ins)
    with_nan, without_nan = (np.minimum, fmin) if parts[0] == "min" else (np.maximum, fmax)
    if is_float(ty):
        fn = with_nan if "NaN" in parts else without_nan
        if ty in ("f32", "f64"):
            return elementwise(program, ins, ty, with_modifiers(ins, fn, ty), 2)
        return half_op(program, ins, ty, fn, 2, relu="relu" in parts)
    if not ty.endswith("x2"):
        return elementwise(program, ins, ty, with_nan, 2)
    d = program.dst(ins.args[0])
    a, b = (program.src(o, "b32", ins) for o in ins.args[1:3])
    half = u16 if ty[0] == "u" else i16

    def step(state: State) -> None:
        x, y = (np.ascontiguousarray(state.regs[s]).view(half).reshape(-1, 2) for s in (a, b))
        put(state, d, np.ascontiguousarray(with_nan(x, y)).view(u32).reshape(-1))

    return step


def compile_dp(program: Program, ins: Instr) -> Step:
    """Compiles dp4a and dp2a, products of small vectors."""
    four = ins.parts[0] == "dp4a"
    signed = [ty == "s32" for ty in ins.parts[-2:]]
    d = program.dst(ins.args[0])
    a, b, c = (program.src(x, "b32", ins) for x in ins.args[1:4])
    type_a = (u8, i8)[signed[0]] if four else (u16, i16)[signed[0]]
    type_b = (u8, i8)[signed[1]]
    high = "hi" in ins.parts

    def elements(value: Array, ty: type) -> Array:
        return np.ascontiguousarray(value).view(ty).reshape(len(value), -1).astype(i64)

    def step(state: State) -> None:
        x, y = elements(state.regs[a], type_a), elements(state.regs[b], type_b)
        if not four:
            y = y[:, 2:] if high else y[:, :2]
        result = (x * y).sum(1) + state.regs[c].view(i32).astype(i64)
        put(state, d, (result & WORD).astype(u32))

    return step


def compile_sad(program: Program, ins: Instr) -> Step:
    """Compiles sad, a sum with an absolute difference."""

    def sad(a: Array, b: Array, c: Array) -> Array:
        return c + np.where(a > b, a - b, b - a)

    return elementwise(program, ins, ins.parts[-1], sad, 3)
