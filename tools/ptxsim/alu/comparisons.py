# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles comparisons, and selections by a predicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import floats
from ..compiling import Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import put
from ..ptx_types import DT, HALVES, Array, f32, f64, is_float, u16, u32
from ..syntax.elements import Pair, Vec
from .closures import load_half

Comparison = Callable[[Array, Array], Array]
ALIASES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ORDERINGS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BOOLEANS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
LOW_HALF, HALF_BITS = u32(0xFFFF), u32(16)
# what set writes for true
TRUE = {
    "f32": u32(0x3F800000),
    "f16": u16(0x3C00),
    "bf16": u16(0x3F80),
    "u16": u16(0xFFFF),
    "s16": u16(0xFFFF),
}
TRUE_HALF = {"f16x2": 0x3C00, "bf16x2": 0x3F80}


def compare(name: str, ty: str) -> Comparison:
    """Returns a comparison; of floating-point numbers, one that treats NaN as PTX says."""
    name = ALIASES.get(name, name)
    if not is_float(ty):
        return ORDERINGS[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":  # ordered: false on NaN
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name in ORDERINGS:
        return ORDERINGS[name]
    if name == "neu":
        return np.not_equal
    ordered = ORDERINGS[name[:-1]]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def compare_halves(name: str, pair: str) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Returns a comparison of pairs, with one result for each half."""
    ty = pair[:-2]
    comparison, load = compare(name, ty), load_half(ty)

    def both(x: Array, y: Array) -> tuple[Array, Array]:
        low = comparison(load((x & LOW_HALF).astype(u16)), load((y & LOW_HALF).astype(u16)))
        high = comparison(load((x >> HALF_BITS).astype(u16)), load((y >> HALF_BITS).astype(u16)))
        return low, high

    return both


def compare_bits(name: str, ty: str, flush: bool) -> Comparison:
    """Returns a comparison of registers that are read as values of a type."""
    comparison, dt = compare(name, ty), DT[ty]
    if ty in HALVES:
        load = load_half(ty)
        return lambda x, y: comparison(load(x), load(y))
    if flush:
        return lambda x, y: comparison(floats.ftz(x.view(dt)), floats.ftz(y.view(dt)))
    return lambda x, y: comparison(x.view(dt), y.view(dt))


def compile_setp(program: Program, ins: Instr) -> Step:
    """Compiles setp, with a second predicate and a Boolean operation where it has them."""
    parts, dst = ins.parts, ins.args[0]
    ty = parts[-1]
    boolean = next((BOOLEANS[p] for p in parts[2:-1] if p in BOOLEANS), None)
    if isinstance(dst, Vec) or (ty.endswith("x2") and boolean):
        raise unsupported(ins)
    if isinstance(dst, Pair):
        first, second = program.dst(dst.first), program.dst(dst.second)
    else:
        first, second = program.dst(dst), None
    a, b = (program.src(o, ty, ins) for o in ins.args[1:3])
    if ty.endswith("x2"):
        return _setp_halves(compare_halves(parts[1], ty), first, second, a, b)
    comparison = compare_bits(parts[1], ty, "ftz" in parts and ty == "f32")
    if boolean is None and second is None:
        return lambda state: put(state, first, comparison(state.regs[a], state.regs[b]))
    other = program.pred(ins.args[3], ins) if boolean else None

    def step(state: State) -> None:
        value = comparison(state.regs[a], state.regs[b])
        negated = ~value
        if boolean is not None:
            c = other(state.regs)
            value, negated = boolean(value, c), boolean(negated, c)
        put(state, first, value)
        if second is not None:
            put(state, second, negated)

    return step


def _setp_halves(
    comparison: Callable[[Array, Array], tuple[Array, Array]],
    first: int,
    second: int | None,
    a: int,
    b: int,
) -> Step:
    def step(state: State) -> None:
        low, high = comparison(state.regs[a], state.regs[b])
        put(state, first, low)
        if second is not None:
            put(state, second, high)

    return step


def compile_set(program: Program, ins: Instr) -> Step:
    """Compiles set, which writes a number instead of a predicate."""
    parts = ins.parts
    dty, sty = parts[-2], parts[-1]
    boolean = next((BOOLEANS[p] for p in parts[2:-2] if p in BOOLEANS), None)
    a, b = (program.src(o, sty, ins) for o in ins.args[1:3])
    d = program.dst(ins.args[0])
    if sty.endswith("x2"):
        halves, one = compare_halves(parts[1], sty), u32(TRUE_HALF.get(dty, 0xFFFF))

        def step_halves(state: State) -> None:
            low, high = halves(state.regs[a], state.regs[b])
            value = np.where(low, one, u32(0)) | (np.where(high, one, u32(0)) << HALF_BITS)
            put(state, d, value)

        return step_halves
    comparison = compare_bits(parts[1], sty, "ftz" in parts and sty == "f32")
    true = TRUE.get(dty, u32(0xFFFFFFFF))
    other = program.pred(ins.args[3], ins) if boolean else None

    def step(state: State) -> None:
        value = comparison(state.regs[a], state.regs[b])
        if boolean is not None:
            value = boolean(value, other(state.regs))
        put(state, d, np.where(value, true, true.dtype.type(0)))

    return step


def compile_selp(program: Program, ins: Instr) -> Step:
    """Compiles selp, which selects by a predicate."""
    ty = ins.parts[-1]
    d = program.dst(ins.args[0])
    p = program.pred(ins.args[3], ins)
    if ty == "pred":
        x, y = program.pred(ins.args[1], ins), program.pred(ins.args[2], ins)
        return lambda state: put(state, d, np.where(p(state.regs), x(state.regs), y(state.regs)))
    a, b = (program.src(o, ty, ins) for o in ins.args[1:3])
    return lambda state: put(state, d, np.where(p(state.regs), state.regs[a], state.regs[b]))


def compile_slct(program: Program, ins: Instr) -> Step:
    """Compiles slct, which selects by a sign."""
    dty, cty = ins.parts[-2], ins.parts[-1]
    d, dt = program.dst(ins.args[0]), DT[cty]
    a, b = (program.src(o, dty, ins) for o in ins.args[1:3])
    c = program.src(ins.args[3], cty, ins)

    def step(state: State) -> None:
        regs = state.regs
        put(state, d, np.where(regs[c].view(dt) >= 0, regs[a], regs[b]))

    return step


def compile_testp(program: Program, ins: Instr) -> Step:
    """Compiles testp, which asks for a class of floating-point numbers."""
    name, ty = ins.parts[1], ins.parts[-1]
    tiny = f32(2.0**-126) if ty == "f32" else f64(2.0**-1022)
    test: Any = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[name]
    d, a, dt = program.dst(ins.args[0]), program.src(ins.args[1], ty, ins), DT[ty]
    return lambda state: put(state, d, test(state.regs[a].view(dt)))


def fmin(a: Array, b: Array) -> Array:
    """Returns the lesser number; NaN only when both are; -0 before +0."""
    equal = np.where(np.signbit(a), a, b)
    number = np.where(a == b, equal, np.minimum(a, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, number))


def fmax(a: Array, b: Array) -> Array:
    """Returns the greater number; NaN only when both are; +0 before -0."""
    equal = np.where(np.signbit(a), b, a)
    number = np.where(a == b, equal, np.maximum(a, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, number))
