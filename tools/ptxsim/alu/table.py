# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says which function compiles which register-to-register instruction."""

from __future__ import annotations

import numpy as np

from ..compiling import Compiler, Instr, Program, Step
from ..errors import unsupported
from . import arithmetic, comparisons, moves, unary
from .bits import bfe, bmsk, szext
from .closures import elementwise
from .conversions import compile_cvt
from .integers import bfind, brev, clz, irem, popc


def _rem(program: Program, ins: Instr) -> Step:
    ty = ins.parts[-1]
    return elementwise(program, ins, ty, irem(ty), 2)


def _bfe(program: Program, ins: Instr) -> Step:
    ty = ins.parts[-1]
    return elementwise(program, ins, ty, bfe(ty), 3, None, [ty, "u32", "u32"])


def _popc(program: Program, ins: Instr) -> Step:
    return elementwise(program, ins, ins.parts[-1], popc, 1, "u32")


def _clz(program: Program, ins: Instr) -> Step:
    return elementwise(program, ins, ins.parts[-1], clz, 1, "u32")


def _brev(program: Program, ins: Instr) -> Step:
    return elementwise(program, ins, ins.parts[-1], brev, 1)


def _bfind(program: Program, ins: Instr) -> Step:
    ty = ins.parts[-1]
    return elementwise(program, ins, ty, bfind(ty, "shiftamt" in ins.parts), 1, "u32")


def _copysign(program: Program, ins: Instr) -> Step:
    """Compiles copysign, which puts the sign of the first operand on the second."""
    return elementwise(program, ins, ins.parts[-1], lambda a, b: np.copysign(b, a), 2)


def _bmsk(program: Program, ins: Instr) -> Step:
    return elementwise(program, ins, "u32", bmsk(ins.parts[1]), 2)


def _szext(program: Program, ins: Instr) -> Step:
    ty = ins.parts[-1]
    return elementwise(program, ins, ty, szext(ins.parts[1], ty[0] == "s"), 2, None, [ty, "u32"])


# correctly rounded, where hardware approximates
SPECIAL: dict[str, Compiler] = {
    "ex2": unary.special_function(np.exp2),
    "lg2": unary.special_function(np.log2),
    "sin": unary.special_function(np.sin),
    "cos": unary.special_function(np.cos),
    "tanh": unary.special_function(np.tanh),
    "rcp": unary.root_or_reciprocal(lambda x: 1.0 / x),
    "sqrt": unary.root_or_reciprocal(np.sqrt),
    "rsqrt": unary.root_or_reciprocal(lambda x: 1.0 / np.sqrt(x)),
}
ALU: dict[str, Compiler] = {
    **SPECIAL,
    "abs": unary.compile_abs,
    "add": arithmetic.compile_addsub,
    "addc": arithmetic.compile_carry,
    "and": unary.logic(lambda a, b: a & b),
    "bfe": _bfe,
    "bfi": unary.compile_bfi,
    "bfind": _bfind,
    "bmsk": _bmsk,
    "brev": _brev,
    "clz": _clz,
    "cnot": unary.logic(lambda a: (a == 0).astype(a.dtype)),
    "copysign": _copysign,
    "createpolicy": moves.constant(0),
    "cvt": compile_cvt,
    "cvta": moves.compile_cvta,
    "div": arithmetic.compile_div,
    "dp2a": arithmetic.compile_dp,
    "dp4a": arithmetic.compile_dp,
    "fma": arithmetic.compile_fma,
    "isspacep": moves.compile_isspacep,
    "lop3": unary.compile_lop3,
    "mad": arithmetic.compile_mad,
    "mad24": arithmetic.compile_mul24,
    "madc": arithmetic.compile_mad,
    "max": arithmetic.compile_minmax,
    "min": arithmetic.compile_minmax,
    "mov": moves.compile_mov,
    "mul": arithmetic.compile_mul,
    "mul24": arithmetic.compile_mul24,
    "neg": unary.compile_neg,
    "not": unary.logic(lambda a: ~a),
    "or": unary.logic(lambda a, b: a | b),
    "popc": _popc,
    "prmt": unary.compile_prmt,
    "rem": _rem,
    "sad": arithmetic.compile_sad,
    "selp": comparisons.compile_selp,
    "set": comparisons.compile_set,
    "setp": comparisons.compile_setp,
    "shf": unary.compile_shf,
    "shl": unary.compile_shl,
    "shr": unary.compile_shr,
    "slct": comparisons.compile_slct,
    "sub": arithmetic.compile_addsub,
    "subc": arithmetic.compile_carry,
    "szext": _szext,
    "testp": comparisons.compile_testp,
    "xor": unary.logic(lambda a, b: a ^ b),
}


def compile_alu(program: Program, ins: Instr) -> Step:
    """Compiles a register-to-register instruction."""
    compiler = ALU.get(ins.parts[0])
    if compiler is None:
        raise unsupported(ins)
    try:
        return compiler(program, ins)
    except KeyError as error:
        raise unsupported(ins, f"no rule for {error}") from None
