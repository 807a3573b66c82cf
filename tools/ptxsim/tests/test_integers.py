# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs integer instructions from PTX written by hand."""

import numpy as np
import pytest

from .ptx_snippets import rng, run, u32


@pytest.mark.parametrize("lut", [0x96, 0xE8, 0x1B, 0x00, 0xFF, 0xCA, 0x2D])
def test_lop3(lut):
    a, b, c = u32(), u32(), u32()
    ref = np.zeros(32, np.uint32)
    for bit in range(32):
        idx = ((a >> bit & 1) << 2) | ((b >> bit & 1) << 1) | (c >> bit & 1)
        ref |= ((lut >> idx) & 1).astype(np.uint32) << np.uint32(bit)
    assert np.array_equal(run(f"lop3.b32 %o, %a0, %a1, %a2, {lut};", [a, b, c]), ref)


def test_bfe_bfi():
    a, b = u32(), u32()
    pos, ln = rng.integers(0, 40, 32).astype(np.uint32), rng.integers(0, 40, 32).astype(np.uint32)
    eu, es, ei = [], [], []
    for x, y, p, n in zip(a.tolist(), b.tolist(), pos.tolist(), ln.tolist(), strict=True):
        eu.append((x >> p) & ((1 << n) - 1) if p < 32 else 0)
        if n == 0:
            es.append(0)
        else:
            sx = x - (1 << 32) if x >> 31 else x
            width = min(n, 32 - min(p, 31))
            v = (sx >> min(p, 31)) & ((1 << width) - 1)
            es.append((v - (1 << width) if v >> (width - 1) else v) % 2**32)
        m = (((1 << n) - 1) << p) & 0xFFFFFFFF
        ei.append((y & ~m & 0xFFFFFFFF) | ((x << p) & m))
    assert run("bfe.u32 %o, %a0, %a1, %a2;", [a, pos, ln]).tolist() == eu
    assert run("bfe.s32 %o, %a0, %a1, %a2;", [a, pos, ln]).tolist() == es
    assert run("bfi.b32 %o, %a0, %a1, %a2, %a3;", [a, b, pos, ln]).tolist() == ei


def test_prmt_shf():
    a, b, c = u32(), u32(), u32()
    ref = []
    for x, y, s in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        by = (x | y << 32).to_bytes(8, "little")
        r = 0
        for k in range(4):
            t = s >> 4 * k & 15
            v = by[t & 7]
            r |= ((255 if v & 128 else 0) if t & 8 else v) << 8 * k
        ref.append(r)
    assert run("prmt.b32 %o, %a0, %a1, %a2;", [a, b, c]).tolist() == ref
    wide = (b.astype(object) << 32) | a.astype(object)
    n = rng.integers(0, 50, 32).astype(np.uint32)
    assert run("shf.l.wrap.b32 %o, %a0, %a1, %a2;", [a, b, n]).tolist() == [
        (int(w) << (int(k) & 31) >> 32) % 2**32 for w, k in zip(wide, n, strict=True)
    ]
    assert run("shf.r.clamp.b32 %o, %a0, %a1, %a2;", [a, b, n]).tolist() == [
        (int(w) >> min(int(k), 32)) % 2**32 for w, k in zip(wide, n, strict=True)
    ]


def test_carry_chain():
    a, b, c, d = u32(), u32(), u32(), u32()
    x = (b.astype(object) << 32) + a
    y = (d.astype(object) << 32) + c
    o = run(
        "add.cc.u32 %r1, %a0, %a2; addc.u32 %r2, %a1, %a3; mov.b64 %o, {%r1, %r2};",
        [a, b, c, d],
        "b64",
    )
    assert o.tolist() == [int(p + q) % 2**64 for p, q in zip(x, y, strict=True)]
    o = run(
        "sub.cc.u32 %r1, %a0, %a2; subc.u32 %r2, %a1, %a3; mov.b64 %o, {%r1, %r2};",
        [a, b, c, d],
        "b64",
    )
    assert o.tolist() == [int(p - q) % 2**64 for p, q in zip(x, y, strict=True)]
    o = run(
        "mad.lo.cc.u32 %r1, %a0, %a1, %a2; madc.hi.u32 %r2, %a0, %a1, 0; mov.b64 %o, {%r1, %r2};",
        [a, b, c],
        "b64",
    )
    assert o.tolist() == [
        (int(p) * int(q) + int(r)) % 2**64 for p, q, r in zip(a, b, c, strict=True)
    ]


def test_misc_integer():
    a, b = u32(), u32()
    sa, sb = a.view(np.int32), b.view(np.int32)
    assert np.array_equal(run("slct.u32.s32 %o, %a0, %a1, %a1;", [a, b]), np.where(sb >= 0, a, b))
    assert np.array_equal(run("not.b32 %o, %a0;", [a]), ~a)
    assert np.array_equal(run("cnot.b32 %o, %a0;", [a & 1]), 1 - (a & 1))
    assert np.array_equal(
        run("sad.u32 %o, %a0, %a1, 7;", [a, b]), np.where(a > b, a - b, b - a) + np.uint32(7)
    )
    assert np.array_equal(
        run("shr.s32 %o, %a0, 40;", [a]), np.where(sa < 0, 2**32 - 1, 0).astype(np.uint32)
    )
    assert np.array_equal(
        run("shl.b32 %o, %a0, %a1;", [a, np.full(32, 32, np.uint32)]), np.zeros(32, np.uint32)
    )
    o = run("mul24.lo.u32 %o, %a0, %a1;", [a, b])
    assert o.tolist() == [
        (int(p & 0xFFFFFF) * int(q & 0xFFFFFF)) % 2**32 for p, q in zip(a, b, strict=True)
    ]
    assert run("bfind.u32 %o, %a0;", [a >> 3]).tolist() == [
        int(x).bit_length() - 1 if x else 2**32 - 1 for x in a >> 3
    ]
    assert run(
        "mul.hi.u64 %o, %a0, %a1;",
        [a.astype(np.uint64) << 33 | b, b.astype(np.uint64) << 31 | a],
        "b64",
    ).tolist() == [
        ((int(p) << 33 | int(q)) % 2**64) * ((int(q) << 31 | int(p)) % 2**64) >> 64
        for p, q in zip(a, b, strict=True)
    ]


def test_bmsk_szext():
    a, b = rng.integers(0, 40, 32).astype(np.uint32), rng.integers(0, 40, 32).astype(np.uint32)
    o = run("bmsk.clamp.b32 %o, %a0, %a1;", [a, b])
    assert o.tolist() == [
        (((1 << min(int(q), 32)) - 1) << min(int(p), 32)) % 2**32 for p, q in zip(a, b, strict=True)
    ]
    x, n = u32(), rng.integers(1, 33, 32).astype(np.uint32)
    o = run("szext.clamp.s32 %o, %a0, %a1;", [x, n]).view(np.int32)
    lo = [int(v) & ((1 << int(k)) - 1) for v, k in zip(x, n, strict=True)]
    assert o.tolist() == [
        v - (1 << int(k)) if v >> (int(k) - 1) else v for v, k in zip(lo, n, strict=True)
    ]
