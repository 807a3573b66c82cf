# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Builds the closures of register-to-register instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import floats
from ..compiling import Instr, Program, State, Step
from ..lanes import put
from ..ptx_types import DT, ROUND, UDT, WIDTH, Array, f16, f32, f64, u16, u32

Function = Callable[..., Array]


def rounding(parts: Sequence[str]) -> str:
    """Returns the rounding mode that an opcode names, or the nearest even."""
    return next((p for p in parts if p in ROUND), "rn")


def elementwise(
    program: Program,
    ins: Instr,
    ty: str,
    fn: Function,
    n: int,
    out_ty: str | None = None,
    in_types: Sequence[str] | None = None,
) -> Step:
    """Compiles d = fn(a, b, ...) with n sources read as `ty` and the result written as `out_ty`."""
    out_ty = out_ty or ty
    in_types = in_types or [ty] * n
    d = program.dst(ins.args[0])
    sources = [program.src(ins.args[1 + k], in_types[k], ins) for k in range(n)]
    types = [DT[t] for t in in_types]
    out = UDT[WIDTH[out_ty]]
    as_stored = all(DT[t] is UDT[WIDTH[t]] for t in (*in_types, out_ty))
    if n == 1:
        return _unary(fn, d, sources[0], types[0], out)
    if n == 2:
        a, b = sources
        if as_stored:
            return lambda state: put(state, d, fn(state.regs[a], state.regs[b]))
        return _binary(fn, d, a, b, types[0], types[1], out)
    return _ternary(fn, d, sources, types, out)


def _unary(fn: Function, d: int, a: int, ta: type, out: type) -> Step:
    return lambda state: put(state, d, fn(state.regs[a].view(ta)).view(out))


def _binary(fn: Function, d: int, a: int, b: int, ta: type, tb: type, out: type) -> Step:
    def step(state: State) -> None:
        regs = state.regs
        put(state, d, fn(regs[a].view(ta), regs[b].view(tb)).view(out))

    return step


def _ternary(
    fn: Function, d: int, sources: Sequence[int], types: Sequence[type], out: type
) -> Step:
    a, b, c = sources
    ta, tb, tc = types

    def step(state: State) -> None:
        regs = state.regs
        put(state, d, fn(regs[a].view(ta), regs[b].view(tb), regs[c].view(tc)).view(out))

    return step


def half_op(
    program: Program,
    ins: Instr,
    ty: str,
    fn: Function,
    n: int,
    relu: bool = False,
    sat: bool = False,
) -> Step:
    """Compiles fn on f64 arrays, for f16 and bf16 scalars and pairs, rounding once."""
    d = program.dst(ins.args[0])
    sources = [program.src(ins.args[1 + k], ty, ins) for k in range(n)]
    pair, bf = ty.endswith("x2"), ty.startswith("bf")

    def load(x: Array) -> Array:
        if pair:
            x = np.ascontiguousarray(x).view(u16).reshape(-1, 2)
        return floats.bf16_to_f32(x).astype(f64) if bf else x.view(f16).astype(f64)

    def step(state: State) -> None:
        v = fn(*[load(state.regs[s]) for s in sources])
        if relu:
            v = np.where(v < 0, 0.0, v)
        if sat:
            v = np.where(np.isnan(v), 0.0, np.clip(v, 0.0, 1.0))
        bits = floats.f64_to_bf16(v) if bf else half_bits(v.astype(f16))
        if pair:
            bits = np.ascontiguousarray(bits).view(u32).reshape(-1)
        put(state, d, bits)

    return step


def half_bits(x: Array) -> Array:
    """Returns the bits of f16 numbers, with the one NaN that the hardware has."""
    return np.where(np.isnan(x), u16(0x7FFF), x.view(u16))


def with_modifiers(ins: Instr, fn: Function, ty: str) -> Function:
    """Applies .ftz and .sat of an instruction to a function of floating-point numbers."""
    flush = "ftz" in ins.parts and ty == "f32"
    sat = "sat" in ins.parts
    if not flush and not sat:
        return fn

    def modified(*operands: Array) -> Array:
        result = fn(*(floats.ftz(x) for x in operands)) if flush else fn(*operands)
        if flush:
            result = floats.ftz(result)
        if sat:
            zero = result.dtype.type(0)
            result = np.where(np.isnan(result), zero, np.clip(result, 0, 1)).astype(result.dtype)
        return result

    return modified


def load_half(ty: str) -> Callable[[Array], Array]:
    """Returns the conversion of f16 or bf16 bits to f32."""
    return floats.bf16_to_f32 if ty == "bf16" else lambda x: x.view(f16).astype(f32)


def approx(fn: Function) -> Function:
    """Returns a function on f32 that computes in f64."""
    return lambda x: fn(x.astype(f64)).astype(f32)
