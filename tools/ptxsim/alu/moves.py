# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles moves, packing and unpacking of registers, and conversions of addresses."""

from __future__ import annotations

import numpy as np

from ..compiling import Compiler, Instr, Program, State, Step
from ..errors import unsupported
from ..lanes import put
from ..memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW
from ..ptx_types import UDT, WIDTH, u8, u16, u32, u64
from ..syntax.elements import SINK, Special, Vec

CLOCKS = ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo")
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
PIECES = {8: u8, 16: u16, 32: u32}  # bits -> type of what a register is packed from


def compile_mov(program: Program, ins: Instr) -> Step:
    """Compiles mov between registers, and between a register and a vector of its pieces."""
    dst, src = ins.args[0], ins.args[1]
    ty = ins.parts[-1]
    if isinstance(dst, Vec):
        return _unpack(program, ins, dst)
    d = program.dst(dst)
    if isinstance(src, Vec):
        return _pack(program, ins, d, src)
    if isinstance(src, Special) and src.name in CLOCKS:
        return _clock(d, src.name == "%clock_hi", u64 if WIDTH[ty] == 64 else u32)
    if ty == "pred":
        p = program.pred(src, ins)
        return lambda state: put(state, d, p(state.regs))
    a = program.src(src, ty, ins)
    return lambda state: put(state, d, state.regs[a])


def _unpack(program: Program, ins: Instr, dst: Vec) -> Step:
    ty, n = ins.parts[-1], len(dst.items)
    slots = [None if item == SINK else program.dst(item) for item in dst.items]
    a = program.src(ins.args[1], ty, ins)
    bits = WIDTH.get(ty, 128) // n
    piece = PIECES.get(bits)
    if piece is None:
        raise unsupported(ins)

    def step(state: State) -> None:
        pieces = np.ascontiguousarray(state.regs[a]).view(piece).reshape(-1, n)
        for k, slot in enumerate(slots):
            if slot is not None:
                value = np.ascontiguousarray(pieces[:, k])
                put(state, slot, value.astype(u16) if bits == 8 else value)

    return step


def _pack(program: Program, ins: Instr, d: int, src: Vec) -> Step:
    width, n = WIDTH[ins.parts[-1]], len(src.items)
    bits = width // n
    piece, out = PIECES[bits], UDT[width]
    slots = [program.src(item, f"b{bits}", ins) for item in src.items]

    def step(state: State) -> None:
        values = [state.regs[slot] for slot in slots]
        packed = np.empty((max(len(v) for v in values), n), piece)
        for k, value in enumerate(values):
            packed[:, k] = value
        put(state, d, packed.view(out).reshape(-1))

    return step


def _clock(d: int, high: bool, dtype: type) -> Step:
    return lambda state: put(state, d, np.array([0 if high else state.steps], dtype))


def compile_isspacep(program: Program, ins: Instr) -> Step:
    """Compiles isspacep, which asks whether a generic address lies in a window."""
    space = ins.parts[1].split("::")[0]
    d, a = program.dst(ins.args[0]), program.src(ins.args[1], "u64", ins)
    low = WINDOWS.get(space)

    def step(state: State) -> None:
        x = state.regs[a]
        if low is not None:
            inside = (x >= low) & (x < low + WINDOW)
        else:
            inside = x < SHARED_WINDOW if space == "global" else np.zeros(1, bool)
        put(state, d, inside)

    return step


def compile_cvta(program: Program, ins: Instr) -> Step:
    """Compiles cvta, which converts between generic addresses and those of a window."""
    parts = ins.parts
    to = "to" in parts
    space = next(p.split("::")[0] for p in parts[1:-1] if p != "to")
    base = u64(WINDOWS.get(space, 0))
    d, a = program.dst(ins.args[0]), program.src(ins.args[1], "u64", ins)

    def step(state: State) -> None:
        x = state.regs[a]
        if x.dtype != u64:
            x = x.astype(u64)
        put(state, d, (x - base if to else x + base) if base else x)

    return step


def constant(value: int) -> Compiler:
    """Returns a compiler of instructions whose result is always the same."""

    def compiler(program: Program, ins: Instr) -> Step:
        d = program.dst(ins.args[0])
        result = np.array([value], UDT[program.width(ins.args[0])])
        return lambda state: put(state, d, result)

    return compiler
