# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles unary functions, logic and shifts."""

from __future__ import annotations

import numpy as np

from .. import floats
from ..compiling import Compiler, Instr, Program, Step
from ..errors import unsupported
from ..lanes import put
from ..ptx_types import HALVES, PAIRS, UDT, WIDTH, Array, f32, f64, is_float, u16, u32, u64
from ..syntax.elements import Imm
from .bits import bfi, lop3, prmt, shf
from .closures import Function, approx, elementwise, half_op, rounding, with_modifiers
from .integers import shl, shr


def special_function(fn: Function) -> Compiler:
    """Returns a compiler of ex2, lg2, sin, cos or tanh."""

    def compiler(program: Program, ins: Instr) -> Step:
        ty = ins.parts[-1]
        if ty in HALVES or ty in PAIRS:
            return half_op(program, ins, ty, fn, 1)
        if ty == "f64":
            return elementwise(program, ins, ty, fn, 1)
        return elementwise(program, ins, ty, with_modifiers(ins, approx(fn), ty), 1)

    return compiler


def root_or_reciprocal(fn: Function) -> Compiler:
    """Returns a compiler of rcp, sqrt or rsqrt."""

    def high_word(x: Array) -> Array:
        return (fn(x).view(u64) & u64(0xFFFFFFFF00000000)).view(f64)

    def compiler(program: Program, ins: Instr) -> Step:
        parts, ty = ins.parts, ins.parts[-1]
        mode = rounding(parts)
        if ty == "f64":
            if mode != "rn":
                raise unsupported(ins)
            # of the approximations only the high word is defined
            approximate = "approx" in parts and parts[0] in ("rcp", "rsqrt")
            return elementwise(program, ins, ty, high_word if approximate else fn, 1)
        if mode == "rn":
            return elementwise(program, ins, ty, with_modifiers(ins, approx(fn), ty), 1)

        def directed(x: Array) -> Array:
            return floats.round_to(fn(x.astype(f64)), f32, mode)

        return elementwise(program, ins, ty, with_modifiers(ins, directed, ty), 1)

    return compiler


def compile_abs(program: Program, ins: Instr) -> Step:
    """Compiles abs."""
    ty = ins.parts[-1]
    if ty in HALVES:
        return elementwise(program, ins, "u16", lambda a: a & u16(0x7FFF), 1)
    if ty in PAIRS:
        return elementwise(program, ins, "u32", lambda a: a & u32(0x7FFF7FFF), 1)
    fn = with_modifiers(ins, np.abs, ty) if is_float(ty) else np.abs
    return elementwise(program, ins, ty, fn, 1)


def compile_neg(program: Program, ins: Instr) -> Step:
    """Compiles neg."""
    ty = ins.parts[-1]
    if ty in HALVES:
        return elementwise(program, ins, "u16", lambda a: a ^ u16(0x8000), 1)
    if ty in PAIRS:
        return elementwise(program, ins, "u32", lambda a: a ^ u32(0x80008000), 1)
    fn = with_modifiers(ins, np.negative, ty) if is_float(ty) else np.negative
    return elementwise(program, ins, ty, fn, 1)


def logic(fn: Function) -> Compiler:
    """Returns a compiler of a bitwise operation, on predicates too."""

    def compiler(program: Program, ins: Instr) -> Step:
        ty = ins.parts[-1]
        if ty != "pred":
            return elementwise(program, ins, ty, fn, len(ins.args) - 1)
        d = program.dst(ins.args[0])
        operands = [program.pred(a, ins) for a in ins.args[1:]]
        return lambda state: put(state, d, fn(*(p(state.regs) for p in operands)))

    return compiler


def compile_shl(program: Program, ins: Instr) -> Step:
    """Compiles shl."""
    ty, amount = ins.parts[-1], ins.args[2]
    width = WIDTH[ty]
    if isinstance(amount, Imm) and 0 <= amount.value < width:
        k = UDT[width](amount.value)
        d, a = program.dst(ins.args[0]), program.src(ins.args[1], ty, ins)
        return lambda state: put(state, d, state.regs[a] << k)
    return elementwise(program, ins, ty, shl(width), 2, None, [ty, "u32"])


def compile_shr(program: Program, ins: Instr) -> Step:
    """Compiles shr."""
    ty = ins.parts[-1]
    ty = "u" + ty[1:] if ty[0] == "b" else ty
    return elementwise(program, ins, ty, shr(ty, WIDTH[ty]), 2, None, [ty, "u32"])


def compile_lop3(program: Program, ins: Instr) -> Step:
    """Compiles lop3."""
    if "or" in ins.parts or "and" in ins.parts or not isinstance(ins.args[4], Imm):
        raise unsupported(ins)
    return elementwise(program, ins, "u32", lop3(ins.args[4].value & 255), 3)


def compile_bfi(program: Program, ins: Instr) -> Step:
    """Compiles bfi."""
    ty = ins.parts[-1]
    insert = bfi(WIDTH[ty])
    d = program.dst(ins.args[0])
    types = (ty, ty, "u32", "u32")
    slots = [program.src(o, t, ins) for o, t in zip(ins.args[1:5], types, strict=True)]
    return lambda state: put(state, d, insert(*(state.regs[s] for s in slots)))


def compile_shf(program: Program, ins: Instr) -> Step:
    """Compiles shf."""
    return elementwise(program, ins, "u32", shf(ins.parts[1], ins.parts[2]), 3)


def compile_prmt(program: Program, ins: Instr) -> Step:
    """Compiles prmt."""
    mode = ins.parts[2] if len(ins.parts) > 2 else None
    return elementwise(program, ins, "u32", prmt(mode), 3)
