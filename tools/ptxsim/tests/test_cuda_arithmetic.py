# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares arithmetic in kernels that nvcc compiles with numpy and Python."""

from fractions import Fraction

import numpy as np
import torch

from .operands import f32, rng


def erf(x):
    from math import erf as e

    return np.vectorize(e)(x)


def test_math32(mod):
    n = 2000
    x, y = f32(n) * 4, f32(n) * 2
    x[:4] = [1e5, -3e6, 0, 30]
    o = np.zeros((n, 24), np.float32)
    mod.launch("math32", 16, 128, [x, y, o, n])
    a, b = x.astype(np.float64), y.astype(np.float64)
    ref = [
        np.sin(a),
        np.cos(a),
        np.exp(b),
        np.log(np.abs(x) + np.float32(1e-3)),
        np.sqrt(abs(a)),
        1 / np.sqrt(np.abs(y) + np.float32(1e-3)),
        a / b,
        a * b + a,
        np.arccos((x / (abs(x) + np.float32(1))).astype(np.float64)),
        np.arctan2(a, b),
        np.tanh(b),
        erf(b),
        (abs(a) + 0.1) ** b,
        np.fmod(a, b),
        np.trunc(a),
        np.rint(a),
        np.floor(a),
        np.exp(b),
        a / b,
        np.exp2(b),
        np.minimum(a, b),
        np.maximum(a, b),
        np.copysign(a, b),
        np.cbrt(a),
    ]
    for k, r in enumerate(ref):
        np.testing.assert_allclose(
            o[:, k], r, rtol=2e-5 if k == 12 else 2e-6, atol=2e-6, err_msg=f"column {k}"
        )


def test_math64(mod):
    n = 500
    x, y = rng.standard_normal(n) * 5, rng.standard_normal(n) * 3
    o = np.zeros((n, 8))
    mod.launch("math64", 4, 128, [x, y, o, n])
    ref = [
        x / y,
        np.sqrt(abs(x)),
        np.exp(y),
        np.log(abs(x) + 1e-3),
        np.sin(x),
        None,
        np.trunc(x),
        np.rint(x),
    ]
    for k, r in enumerate(ref):
        if r is not None:
            np.testing.assert_allclose(o[:, k], r, rtol=1e-14, atol=1e-15, err_msg=f"column {k}")
    # the residue that a fused multiply-add keeps, exactly
    err = [
        float(Fraction(p) * Fraction(q) - Fraction(p * q))
        for p, q in zip(x.tolist(), y.tolist(), strict=True)
    ]
    assert o[:, 5].tolist() == err


def s32(v):
    return (v + 2**31) % 2**32 - 2**31


def s64(v):
    return (v + 2**63) % 2**64 - 2**63


def test_ints(mod):
    n = 300
    x = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    y = rng.integers(-(2**31), 2**31, n).astype(np.int32)
    y[:50] = rng.integers(1, 100, 50)
    u = rng.integers(-(2**63), 2**63, n).astype(np.int64)
    o = np.zeros((n, 24), np.int64)
    mod.launch("ints", 3, 128, [x, y, u, o, n])

    def td(p, q):
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for i in range(n):
        a, b, c = int(x[i]), int(y[i]), int(u[i])
        ua, ub, uc = a % 2**32, b % 2**32, c % 2**64
        bytes8 = (ua | ub << 32).to_bytes(8, "little")

        def sb(v):
            return [(v >> 8 * k & 255) - 256 * (v >> 8 * k + 7 & 1) for k in range(4)]

        ref = [
            td(a, b),
            a - td(a, b) * b,
            ua // ub,
            ua % ub,
            (a * b) >> 32,
            (ua * ub) >> 32,
            bin(ua).count("1"),
            32 - ua.bit_length(),
            int(f"{ua:032b}"[::-1], 2),
            (ua & -ua).bit_length(),
            td(c, a),
            c - td(c, b) * b,
            (c * s64(a * b)) >> 64,
            ((ub << 32 | ua) << 7 >> 32) % 2**32,
            sum(bytes8[k] << 8 * j for j, k in enumerate((0, 4, 2, 6))),
            a >> (b & 31),
            s64(uc << (b & 63)),
            s64(uc >> (a & 63)),
            s32(sum(p * q for p, q in zip(sb(ua), sb(ub), strict=True)) + 5),
            abs(a),
            (a + 2**15) % 2**16 - 2**15,
            a & 255,
            64 - uc.bit_length(),
            (min(a, b) + max(ua, ub)) % 2**32,
        ]
        got = o[i].tolist()
        for k, (g, r) in enumerate(zip(got, ref, strict=True)):
            if k in (8, 13, 14):
                g %= 2**32
            assert g == r, f"row {i} column {k}: {g} != {r} (a={a} b={b} c={c})"


def test_converts(mod):
    x = np.concatenate(
        [
            f32(500) * 100,
            f32(100) * 1e-6,
            np.array([65504, 70000, -1e30, 0, -0.0, 1.5, 2.5, 3e38, np.inf, -np.inf], np.float32),
        ]
    )
    n = len(x)
    o, q = np.zeros((n, 8), np.float32), np.zeros((n, 6), np.int32)
    mod.launch("converts", (n + 127) // 128, 128, [x, o, q, n])
    t = torch.from_numpy(x)

    def eq(a, b):
        return np.testing.assert_array_equal(a, b)

    eq(o[:, 0], t.bfloat16().float().numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        eq(o[:, 1], x.astype(np.float16).astype(np.float32))
        rz = o[:, 2]
        fin = np.isfinite(x)
        assert (np.abs(rz[fin]) <= np.abs(x[fin])).all() and np.abs(rz[fin]).max() == 65504
        lo, _hi = t.bfloat16().double(), (t * 3).bfloat16().double()
        r = (lo * lo + lo).float().bfloat16().float().numpy()
        np.testing.assert_array_equal(o[:, 3][fin], r[fin])
        h = x.astype(np.float16)
        eq(o[:, 5], (h + h * h).astype(np.float32))
    c = np.clip(np.rint(x.astype(np.float64)), -(2**31), 2**31 - 1)
    eq(q[:, 0], c.astype(np.int32))
    with np.errstate(over="ignore"):
        y = (x * np.float32(1e8)).astype(np.float64)
    eq(q[:, 1], np.clip(np.trunc(y), -(2**31), 2**31 - 1).astype(np.int32))
    eq(
        q[:, 3].view(np.uint32),
        np.clip(np.rint(x.astype(np.float64)), 0, 2**32 - 1).astype(np.uint32),
    )
