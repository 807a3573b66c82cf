# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles wgmma, a matrix product by the four warps of a warpgroup.

It is asynchronous, with operands in shared memory. A product is computed when it is issued, from
what registers and shared memory hold then, and appears in the accumulators at the wait_group that
covers it. Whatever must not be touched in between is checked, so that any other moment the hardware
may choose would give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..compiling import Instr, Program, State, Step
from ..errors import SimError, WarpSyncError, unsupported
from ..lanes import active
from ..ptx_types import Array, f16, f32, i32, i64, u8, u32, u64
from ..syntax.elements import Imm, Reg, Vec
from .layouts import K_OF, RESERVED, decode

LANES = 128  # of a warpgroup
ROWS = 64
TRANSPOSABLE = ("f16", "bf16")  # the only types that may be MN-major


def compile_wgmma(program: Program, ins: Instr) -> Step:
    """Compiles products, fences, commits and waits."""
    op = ins.parts[1]
    if op == "mma_async":
        return _compile_product(program, ins)
    if op == "fence":
        return lambda state: state.wgmma.fence(state)
    if op == "commit_group":
        return lambda state: state.wgmma.commit(state)
    if op == "wait_group":
        n = ins.args[0].value
        return lambda state: state.wgmma.wait(state, n)
    raise unsupported(ins)


def is_proxy_fence(ins: Instr) -> bool:
    """Returns whether an instruction is a fence.proxy.async that covers shared memory."""
    parts = ins.parts
    proxy = parts[0] == "fence" and parts[1] == "proxy" and parts[2].startswith("async")
    return proxy and "global" not in parts


def watch(step: Step, ins: Instr, slots: tuple[int, ...]) -> Step:
    """Returns a step that first reports its access to registers of some wgmma."""

    def watched(state: State) -> None:
        state.wgmma.touch(state, ins, slots)
        step(state)

    return watched


def named_registers(program: Program, ins: Instr) -> list[int]:
    """Returns the 32-bit registers a wgmma names: accumulators, and A when it is in registers."""
    vectors = (a for a in ins.args if isinstance(a, Vec))
    return [program.reg_slot(r) for vector in vectors for r in vector.items if isinstance(r, Reg)]


def group_value(state: State, ins: Instr, value: Array, what: str) -> Array:
    """Returns one value for each active warpgroup, which all its threads must hold."""
    if len(value) == 1:
        return np.broadcast_to(value, (len(state.lanes()) // LANES,))
    groups = active(state, value).reshape(-1, LANES)
    bad = (groups != groups[:, :1]).any(1)
    if bad.any():
        k = int(np.argmax(bad)) * LANES
        message = f"threads of a warpgroup disagree about {what}"
        state.fault(WarpSyncError, message, ins, state.lanes_or_none(), k)
    return groups[:, 0]


@dataclass
class Shape:
    """Describes a product: its name in PTX, extents, types and layouts."""

    name: str
    n: int
    k: int
    out: str
    a: str
    b: str
    a_in_registers: bool
    a_major: int  # 1 for MN-major
    b_major: int
    sign: float

    @property
    def integer(self) -> bool:
        """Returns whether the product is one of integers."""
        return self.out == "s32"


def shape_of(ins: Instr) -> Shape:
    """Returns the product that an instruction names."""
    parts = ins.parts
    types = [p for p in parts[5:] if p != "satfinite"]
    if parts[2:4] != ["sync", "aligned"] or len(types) != 3:
        raise unsupported(ins)
    name, (out, a, b) = parts[4], types
    m, _, rest = name.partition("n")
    n, _, k = rest.partition("k")
    integers = {a, b} <= {"s8", "u8"}
    if m != f"m{ROWS}" or not (n + k).isdigit() or not K_OF.get(a) == K_OF.get(b) == int(k):
        raise unsupported(ins)
    if int(n) % 8 or not 8 <= int(n) <= 256 or (out == "s32") != integers:
        raise unsupported(ins)
    if out not in ("f32", "f16", "s32") or (out == "f16" and a not in ("f16", "e4m3", "e5m2")):
        raise unsupported(ins)
    in_registers = isinstance(ins.args[1], Vec)
    signs, majors = _immediates(ins, 0 if integers else 2, a in TRANSPOSABLE, in_registers)
    a_major, b_major = majors
    sign = float(np.prod(signs))
    return Shape(name, int(n), int(k), out, a, b, in_registers, a_major, b_major, sign)


def _immediates(
    ins: Instr, n_signs: int, transposable: bool, in_registers: bool
) -> tuple[list[int], list[int]]:
    """Returns the signs of the operands, and whether they are MN-major."""
    n_majors = 0 if not transposable else 1 if in_registers else 2
    values = [o.value for o in ins.args[4:] if isinstance(o, Imm)]
    all_immediate = len(values) == len(ins.args) - 4
    if not all_immediate or len(values) != n_signs + n_majors or not isinstance(ins.args[0], Vec):
        raise unsupported(ins, "operands")
    signs, majors = values[:n_signs], values[n_signs:]
    if any(s not in (1, -1) for s in signs):
        raise unsupported(ins, "scale of an operand")
    return signs, [0] * (2 - n_majors) + majors


def _compile_product(program: Program, ins: Instr) -> Step:
    shape = shape_of(ins)
    d, a, b = ins.args[:3]
    keep = program.pred(ins.args[3], ins)
    acc = tuple(program.dst(r) for r in d.items)
    frag = tuple(program.src(r, "b32", ins) for r in a.items) if shape.a_in_registers else ()
    per_register = 4 if shape.out == "f16" else 2
    if len(acc) != shape.n // per_register or (shape.a_in_registers and len(frag) != 4):
        raise unsupported(ins, "fragment sizes")
    descriptor_a = None if shape.a_in_registers else program.src(a, "b64", ins)
    descriptor_b = program.src(b, "b64", ins)
    accumulate = _accumulator(shape, "satfinite" in ins.parts)

    def operands(state: State) -> tuple[Array, Array, Array]:
        """Returns A, B and the indices of what they occupy in shared memory."""
        where = []
        if descriptor_a is not None:
            name = "the descriptor of A"
            where.append(_place(state, ins, descriptor_a, ROWS, shape.a_major, name))
        name = "the descriptor of B"
        where.append(_place(state, ins, descriptor_b, shape.n, shape.b_major, name))
        groups = len(where[0])
        flat = np.concatenate([w.reshape(groups, -1) for w in where], axis=1)
        index, data = state.shared.begin_mma_read(state, ins, flat)
        n_a = where[0][0].size if descriptor_a is not None else 0
        in_b = np.ascontiguousarray(data[:, n_a:]).reshape(where[-1].shape)
        y = _from_shared(in_b, shape.b, shape.b_major)
        if descriptor_a is None:
            return _from_registers(state, frag, shape, groups), y, index
        in_a = np.ascontiguousarray(data[:, :n_a]).reshape(where[0].shape)
        return _from_shared(in_a, shape.a, shape.a_major).swapaxes(1, 2), y, index

    def step(state: State) -> None:
        queue = state.wgmma
        queue.check(state, ins, acc, frag, shape.name)
        x, y, index = operands(state)
        groups = len(x)
        state.mma_flops += 2 * ROWS * shape.n * shape.k * groups
        product = np.matmul(x, y) * shape.sign
        kept = np.repeat(group_value(state, ins, keep(state.regs), "scale-d"), LANES)
        old = [queue.read(state, s) for s in acc] if kept.any() else None
        for s, value in zip(acc, accumulate(_fragment(product), old, kept), strict=True):
            queue.write(state, s, value)
        queue.issue(state, ins, acc, frag, shape.name, index)

    return step


def _place(state: State, ins: Instr, slot: int, mn: int, mn_major: int, what: str) -> Array:
    """Returns the chunks of an operand for each active warpgroup."""
    values = group_value(state, ins, state.regs[slot], what)
    reserved = values & u64(RESERVED) != 0
    if reserved.any():
        message = f"{what} {int(values[np.argmax(reserved)]):#x} has reserved bits set"
        state.fault(SimError, message, ins, state.lanes_or_none(), 0)
    if (values == values[0]).all():
        chunks = state.wgmma.chunks(int(values[0]), mn, mn_major)
        return np.broadcast_to(chunks, (len(values), *chunks.shape))
    return np.stack([state.wgmma.chunks(int(v), mn, mn_major) for v in values])


def _from_shared(chunks: Array, kind: str, mn_major: int) -> Array:
    """Returns an operand as (warpgroups, K, MN)."""
    x = decode(chunks.view(u8), kind)
    return x if mn_major else x.swapaxes(1, 2)


def _from_registers(state: State, frag: tuple[int, ...], shape: Shape, groups: int) -> Array:
    """Returns A as (warpgroups, M, K)."""
    # (half of K, half of the rows), warpgroups, warps, rows, columns
    words = np.stack([active(state, state.regs[s]).reshape(groups, 4, 8, 4) for s in frag])
    x = decode(np.ascontiguousarray(words)[..., None], shape.a).reshape(2, 2, groups, 4, 8, -1)
    return x.transpose(2, 3, 1, 4, 0, 5).reshape(groups, ROWS, shape.k)


def _fragment(product: Array) -> Array:
    """Returns (warpgroups, M, N) as (pairs of columns and half rows, element, lanes).

    Rows are 16 w + 8 h + r, columns 8 j + 2 t + e.
    """
    groups, _, n = product.shape
    p = product.reshape(groups, 4, 2, 8, n // 8, 4, 2)
    return p.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 4, 2, -1)


# what registers hold, of a fragment, their old values if any are kept, and where they are
Accumulate = Callable[[Array, list[Array] | None, Array], list[Array]]


def _accumulator(shape: Shape, saturate: bool) -> Accumulate:
    def halves(fragment: Array, old: list[Array] | None, kept: Array) -> list[Array]:
        out = []
        for k, pair in enumerate(fragment):
            v = np.stack([pair[0], pair[1]], 1)
            if old is not None:
                c = np.ascontiguousarray(old[k]).view(f16).reshape(-1, 2)
                v = v + np.where(kept[:, None], c, 0)
            out.append(np.ascontiguousarray(v.astype(f16)).view(u32).reshape(-1))
        return out

    def words(fragment: Array, old: list[Array] | None, kept: Array) -> list[Array]:
        out = []
        for k, v in enumerate(fragment.reshape(-1, fragment.shape[-1])):
            if old is not None:
                v = v + np.where(kept, old[k].view(i32 if shape.integer else f32), 0)
            if not shape.integer:
                out.append(v.astype(f32).view(u32))
                continue
            v = np.clip(v, -(2**31), 2**31 - 1) if saturate else v
            out.append((v.astype(i64) & i64(0xFFFFFFFF)).astype(u32))
        return out

    return halves if shape.out == "f16" else words
