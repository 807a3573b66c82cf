# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs floating-point instructions and conversions from PTX written by hand."""

import numpy as np
import pytest
import torch

from tools.ptxsim import floats as F

from .ptx_snippets import f32, rng, run, u32


def test_setp_forms():
    a, b = f32(), f32()
    a[:6] = [np.nan, 1, np.nan, 0, -0.0, np.inf]
    b[:6] = [1, np.nan, np.nan, -0.0, 0, np.inf]
    for cmp, ref in [
        ("lt", a < b),
        ("ltu", ~(a >= b)),
        ("eq", a == b),
        ("ne", (a != b) & ~np.isnan(a) & ~np.isnan(b)),
        ("neu", a != b),
        ("num", ~np.isnan(a) & ~np.isnan(b)),
        ("nan", np.isnan(a) | np.isnan(b)),
        ("geu", ~(a < b)),
    ]:
        o = run(
            f"setp.{cmp}.f32 %x, %a0, %a1; selp.b32 %o, 1, 0, %x;",
            [a.view(np.uint32), b.view(np.uint32)],
        )
        assert o.astype(bool).tolist() == ref.tolist(), cmp
    x, y = u32(), u32()
    o = run(
        "setp.gt.s32 %z, %a0, 0; setp.lt.and.u32 %x|%y, %a0, %a1, !%z; "
        "selp.b32 %r1, 1, 0, %x; selp.b32 %r2, 2, 0, %y; or.b32 %o, %r1, %r2;",
        [x, y],
    )
    nz = ~(x.view(np.int32) > 0)
    assert o.tolist() == (((x < y) & nz) * 1 + (~(x < y) & nz) * 2).tolist()


def test_min_max_nan():
    a, b = f32(), f32()
    a[:3], b[:3] = [np.nan, 1, np.nan], [2, np.nan, np.nan]
    i = [a.view(np.uint32), b.view(np.uint32)]
    np.testing.assert_array_equal(run("min.f32 %o, %a0, %a1;", i).view(np.float32), np.fmin(a, b))
    np.testing.assert_array_equal(
        run("max.NaN.f32 %o, %a0, %a1;", i).view(np.float32), np.maximum(a, b)
    )


def test_ftz():
    x = np.array([1e-39, -1e-39, 1e-38 * 1.5, 2e-38] * 8, np.float32)
    o = run("mul.ftz.f32 %o, %a0, 0f3F800000;", [x.view(np.uint32)]).view(np.float32)
    ref = np.where(abs(x) < 2.0**-126, 0, x)
    assert np.array_equal(o, ref) and np.signbit(o[1])
    o = run("mul.f32 %o, %a0, 0f3F800000;", [x.view(np.uint32)]).view(np.float32)
    assert np.array_equal(o, x)


def test_fma_is_fused():
    a = np.full(32, 1 + 2.0**-12, np.float32)
    o = run(
        "mul.f32 %r1, %a0, %a0; neg.f32 %r1, %r1; fma.rn.f32 %o, %a0, %a0, %r1;",
        [a.view(np.uint32)],
    ).view(np.float32)
    assert (o == np.float32(2.0**-24)).all()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_rounding_modes(mode):
    x = rng.standard_normal(32) * 10.0 ** rng.integers(-10, 10, 32)
    o = run(f"cvt.{mode}.f32.f64 %o, %a0;", [x.view(np.uint64)]).view(np.float32)
    near = x.astype(np.float32)
    down = np.where(near.astype(np.float64) > x, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near.astype(np.float64) < x, np.nextafter(near, np.float32(np.inf)), near)
    ref = {"rn": near, "rm": down, "rp": up, "rz": np.where(x < 0, up, down)}[mode]
    assert np.array_equal(o, ref)
    a, b = f32() * 1e-4, f32()
    o = run(f"add.{mode}.f32 %o, %a0, %a1;", [a.view(np.uint32), b.view(np.uint32)]).view(
        np.float32
    )
    s = a.astype(np.float64) + b
    near = s.astype(np.float32)
    down = np.where(near > s, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near < s, np.nextafter(near, np.float32(np.inf)), near)
    assert np.array_equal(
        o, {"rn": near, "rm": down, "rp": up, "rz": np.where(s < 0, up, down)}[mode]
    )


def test_cvt_packs():
    a, b = f32() * 100, f32() * 1e-3
    i = [a.view(np.uint32), b.view(np.uint32)]
    o = run("cvt.rn.bf16x2.f32 %o, %a0, %a1;", i)

    def bf(x):
        return (
            torch.from_numpy(x)
            .bfloat16()
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
            .astype(np.uint32)
        )

    assert np.array_equal(o, bf(a) << 16 | bf(b))
    o = run("cvt.rn.f16x2.f32 %o, %a0, %a1;", i)

    def h(x):
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)

    assert np.array_equal(o, h(a) << 16 | h(b))
    o = run("cvt.rn.relu.bf16x2.f32 %o, %a0, %a1;", i)
    assert np.array_equal(o, bf(np.maximum(a, 0)) << 16 | bf(np.maximum(b, 0)))
    o = run("cvt.rna.tf32.f32 %o, %a0;", i[:1]).view(np.float32)
    assert (np.abs(o - a) <= np.abs(a) * 2.0**-11).all() and not (o.view(np.uint32) & 0x1FFF).any()
    for kind, dt in [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]:
        o = run(f"cvt.rn.satfinite.{kind}x2.f32 %o, %a0, %a1;", i, "b16")

        def t(x, dt=dt):
            return torch.from_numpy(x).to(dt).view(torch.uint8).numpy().astype(np.uint16)

        assert np.array_equal(o, t(a) << 8 | t(b))
        back = run(
            f"mov.b32 {{%h1, %h2}}, %a0; cvt.rn.f16x2.{kind}x2 %o, %h1;", [o.astype(np.uint32)]
        )
        v = (
            torch.from_numpy((o & 255).astype(np.uint8))
            .view(dt)
            .to(torch.float16)
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )
        assert np.array_equal(back & 0xFFFF, v)


def test_cvt_int_edges():
    x = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 2.5, 3.5, -0.5] * 4, np.float32)
    o = run("cvt.rni.s32.f32 %o, %a0;", [x.view(np.uint32)]).view(np.int32)
    assert o[:8].tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2, 4, 0]
    o = run("cvt.rzi.u32.f32 %o, %a0;", [x.view(np.uint32)])
    assert o[:8].tolist() == [0, 2**32 - 1, 0, 3000000000, 0, 2, 3, 0]
    y = np.array([300, -300, 5, -5] * 8, np.int32)
    assert run("cvt.sat.s8.s32 %o, %a0;", [y.view(np.uint32)]).view(np.int32)[:4].tolist() == [
        127,
        -128,
        5,
        -5,
    ]
    assert run("cvt.u8.u32 %o, %a0;", [y.view(np.uint32)])[:4].tolist() == [44, 212, 5, 251]
    assert run("cvt.s8.s32 %o, %a0;", [y.view(np.uint32)]).view(np.int32)[:4].tolist() == [
        44,
        -44,
        5,
        -5,
    ]


def test_half_pairs():
    a, b, c = (rng.standard_normal(64).astype(np.float16) for _ in range(3))
    i = [x.view(np.uint32) for x in (a, b, c)]
    o = run("fma.rn.f16x2 %o, %a0, %a1, %a2;", i).view(np.float16)
    assert np.array_equal(o, (a.astype(np.float64) * b + c).astype(np.float16))
    o = run("max.f16x2 %o, %a0, %a1;", i).view(np.float16)
    assert np.array_equal(o, np.maximum(a, b))
    t = [torch.from_numpy(x).bfloat16() for x in (a, b, c)]
    j = [x.view(torch.int16).numpy().view(np.uint32) for x in t]
    o = run("fma.rn.bf16x2 %o, %a0, %a1, %a2;", j).view(np.int16)
    ref = (t[0].double() * t[1].double() + t[2].double()).bfloat16()
    assert np.array_equal(o, ref.view(torch.int16).numpy())
    o = run("neg.bf16x2 %o, %a0;", j[:1]).view(np.int16)
    assert np.array_equal(o, (-t[0]).view(torch.int16).numpy())


def test_rounding_helpers():
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float64)
    assert F.bf16_to_f32(F.f64_to_bf16(x)).tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-6]
