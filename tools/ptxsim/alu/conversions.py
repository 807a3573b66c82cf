# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles cvt."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .. import floats
from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..fp8 import fp8_table, to_fp8
from ..lanes import extend_to, put
from ..ptx_types import (
    DT,
    INT_RANGE,
    IROUND,
    UDT,
    WIDTH,
    Array,
    f16,
    f32,
    f64,
    i8,
    i32,
    is_float,
    u8,
    u16,
    u32,
    u64,
)
from .closures import half_bits, rounding

FP8_PAIRS = ("e4m3x2", "e5m2x2")
F16_MAX = 65504


class Modifiers(NamedTuple):
    """Holds the modifiers of a conversion between `dty` and `sty`."""

    dty: str
    sty: str
    mode: str
    to_integer: str | None
    relu: bool
    satfinite: bool
    sat: bool
    flush: bool  # of subnormal f32 values


def modifiers_of(parts: list[str]) -> Modifiers:
    """Returns the modifiers that an opcode names."""
    dty, sty, words = parts[-2], parts[-1], parts[1:-2]
    return Modifiers(
        dty,
        sty,
        rounding(words),
        next((p for p in words if p in IROUND), None),
        "relu" in words,
        "satfinite" in words,
        "sat" in words,
        "ftz" in words and "f32" in (dty, sty),
    )


def compile_cvt(program: Program, ins: Instr) -> Step:
    """Compiles cvt by the kinds of its two types."""
    if ins.parts[1] == "pack":
        return _pack_integers(program, ins)
    how = modifiers_of(ins.parts)
    if how.dty in ("f16x2", "bf16x2") and how.sty == "f32":
        return _halves_from_f32(program, ins, how)
    if how.dty in FP8_PAIRS:
        return _to_fp8(program, ins, how)
    if how.sty in FP8_PAIRS and how.dty == "f16x2":
        return _from_fp8(program, ins, how)
    if how.dty == "tf32":
        return _to_tf32(program, ins, how)
    if how.dty not in DT or how.sty not in DT:
        raise unsupported(ins)
    convert = {
        (False, False): _integer_to_integer,
        (True, False): _float_to_integer,
        (False, True): _integer_to_float,
        (True, True): _float_to_float,
    }[is_float(how.sty), is_float(how.dty)](how)
    dst, src = program.dst(ins.args[0]), program.src(ins.args[1], how.sty, ins)
    bits = program.width(ins.args[0]) or WIDTH[how.dty]
    read = read_as(how.sty)

    def step(state: State) -> None:
        value = convert(read(state.regs[src]))
        put(state, dst, value if is_float(how.dty) else extend_to(value, bits))

    return step


# ---- one value
def read_as(ty: str) -> Callable[[Array], Array]:
    """Returns what reads a register, which may be wider than the type, as values of the type."""
    if ty in ("u8", "b8"):
        return lambda r: r.astype(u8)
    if ty == "s8":
        return lambda r: r.astype(u8).view(i8)
    if ty == "f16":
        return lambda r: r.astype(u16).view(f16)
    if ty == "bf16":
        return lambda r: floats.bf16_to_f32(r.astype(u16))
    dt = DT[ty]
    unsigned = np.dtype(f"u{np.dtype(dt).itemsize}")
    return lambda r: (r if r.dtype == unsigned else r.astype(unsigned)).view(dt)


def float_to_int(x: Array, ty: str, mode: str) -> Array:
    """Rounds to an integer type, clamping to its range. NaN gives 0, in 64 bits 2**63."""
    low, high = INT_RANGE[ty]
    dt = DT[ty]
    rounded = IROUND[mode](x.astype(f64) if x.dtype != f64 else x)
    nan = np.isnan(rounded)
    over, under = rounded >= f64(float(high)), rounded <= f64(low)
    value = np.where(nan | over | under, 0.0, rounded).astype(dt)
    value = np.where(over, dt(high), np.where(under, dt(low), value))
    if WIDTH[ty] == 64:
        return np.where(nan, u64(1 << 63).view(dt), value)
    return np.where(nan, dt(0), value)


def _integer_to_integer(how: Modifiers) -> Callable[[Array], Array]:
    low, high = INT_RANGE.get(how.dty, (0, 0))
    dt = DT[how.dty]

    def convert(x: Array) -> Array:
        if how.sat:
            info = np.iinfo(x.dtype)
            x = np.clip(x, max(low, info.min), min(high, info.max))
        return x.astype(dt)

    return convert


def _float_to_integer(how: Modifiers) -> Callable[[Array], Array]:
    def convert(x: Array) -> Array:
        if how.flush:
            x = floats.ftz(x)
        return float_to_int(x, how.dty, how.to_integer or "rzi")

    return convert


def _integer_to_float(how: Modifiers) -> Callable[[Array], Array]:
    wide = WIDTH[how.sty] == 64

    def rounded(x: Array) -> Array:
        if how.dty == "f16":
            return floats.round_to(x.astype(f64), f16, how.mode)
        dt = DT[how.dty]
        if how.mode == "rn":
            return x.astype(dt)
        exact = np.longdouble if wide or how.dty == "f64" else f64
        return floats.round_to(x.astype(exact), dt, how.mode)

    def convert(x: Array) -> Array:
        if how.dty == "bf16":
            x = x.astype(np.longdouble).astype(f64) if wide else x.astype(f64)
            return floats.f32_to_bf16(floats.f64_to_f32_odd(x), how.mode)
        result = rounded(x)
        if how.sat:
            result = np.clip(result, 0, 1).astype(result.dtype)
        return result.view(UDT[WIDTH[how.dty]])

    return convert


def _float_to_float(how: Modifiers) -> Callable[[Array], Array]:
    dty, sty = how.dty, how.sty
    widens = WIDTH[dty] >= WIDTH[sty] and sty != "bf16"

    def narrowed(x: Array) -> Array:
        if how.relu:
            x = np.where(x < 0, x.dtype.type(0), x)
        result = x.astype(DT[dty]) if widens else floats.round_to(x, DT[dty], how.mode)
        if how.satfinite and dty == "f16":
            result = _finite_f16(result)
        return floats.ftz(result) if how.flush and dty == "f32" else result

    def convert(x: Array) -> Array:
        if how.flush and sty == "f32":
            x = floats.ftz(x)
        if how.to_integer:
            x = IROUND[how.to_integer](x)
        if how.sat:
            x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)
        if dty == "bf16":
            x = floats.f64_to_f32_odd(x) if sty == "f64" else x.astype(f32)
            return floats.f32_to_bf16(x, how.mode, how.relu, how.satfinite)
        result = narrowed(x)
        return half_bits(result) if dty == "f16" else result.view(UDT[WIDTH[dty]])

    return convert


def _finite_f16(x: Array) -> Array:
    return np.where(np.isinf(x), np.copysign(f16(F16_MAX), x), x)


# ---- pairs and formats of their own
def _halves_from_f32(program: Program, ins: Instr, how: Modifiers) -> Step:
    dst = program.dst(ins.args[0])
    a, b = (program.src(o, "f32", ins) for o in ins.args[1:3])

    def half(x: Array) -> Array:
        if how.dty == "bf16x2":
            return floats.f32_to_bf16(x, how.mode, how.relu, how.satfinite)
        if how.relu:
            x = np.where(x < 0, f32(0), x)
        h = floats.round_to(x, f16, how.mode)
        if how.satfinite:
            h = _finite_f16(h)
        return np.where(np.isnan(x), u16(0x7FFF), h.view(u16))

    def step(state: State) -> None:
        high, low = half(state.regs[a].view(f32)), half(state.regs[b].view(f32))
        put(state, dst, (high.astype(u32) << u32(16)) | low)

    return step


def _to_fp8(program: Program, ins: Instr, how: Modifiers) -> Step:
    kind, dst = how.dty[:4], program.dst(ins.args[0])
    if how.sty == "f32":
        a, b = (program.src(o, "f32", ins) for o in ins.args[1:3])

        def from_f32(state: State) -> None:
            high = to_fp8(state.regs[a].view(f32), kind, how.relu)
            low = to_fp8(state.regs[b].view(f32), kind, how.relu)
            put(state, dst, (high << u16(8)) | low)

        return from_f32
    if how.sty != "f16x2":
        raise unsupported(ins)
    pair = program.src(ins.args[1], "b32", ins)

    def from_f16(state: State) -> None:
        x = np.ascontiguousarray(state.regs[pair]).view(f16).reshape(-1, 2).astype(f32)
        high, low = to_fp8(x[:, 1], kind, how.relu), to_fp8(x[:, 0], kind, how.relu)
        put(state, dst, (high << u16(8)) | low)

    return from_f16


def _from_fp8(program: Program, ins: Instr, how: Modifiers) -> Step:
    dst, src = program.dst(ins.args[0]), program.src(ins.args[1], "b16", ins)
    halves = fp8_table(how.sty[:4]).astype(f16).view(u16).astype(u32)

    def step(state: State) -> None:
        x = state.regs[src]
        put(state, dst, halves[x & u16(255)] | (halves[x >> u16(8)] << u32(16)))

    return step


def _to_tf32(program: Program, ins: Instr, how: Modifiers) -> Step:
    dst, src = program.dst(ins.args[0]), program.src(ins.args[1], "f32", ins)

    def step(state: State) -> None:
        x = state.regs[src].view(f32)
        put(state, dst, floats.f32_to_tf32(x, how.mode, how.satfinite, how.relu).view(u32))

    return step


def _pack_integers(program: Program, ins: Instr) -> Step:
    """Compiles `cvt.pack.sat.dty.s32[.b32] d, a, b[, c]`."""
    dty = ins.parts[3]
    if dty not in ("u16", "s16", "u8", "s8"):
        raise unsupported(ins)
    dst = program.dst(ins.args[0])
    a, b = (program.src(o, "s32", ins) for o in ins.args[1:3])
    c = program.src(ins.args[3], "b32", ins) if len(ins.args) > 3 else None
    low, high = INT_RANGE[dty]
    bits = WIDTH[dty]
    mask = u32((1 << bits) - 1)

    def step(state: State) -> None:
        x, y = (np.clip(state.regs[s].view(i32), low, high).view(u32) & mask for s in (a, b))
        packed = (x << u32(bits)) | y
        if c is not None:
            packed = (state.regs[c] << u32(2 * bits)) | packed
        put(state, dst, packed)

    return step
