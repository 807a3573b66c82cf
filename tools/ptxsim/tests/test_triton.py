# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs Triton kernels without matrix products, compiled for sm_80."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from tools import ptxsim
from tools.ptxsim.triton_adapter import run

from .triton_kernels import cdiv, k_softmax


@triton.jit
def k_add(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(o + i, tl.load(x + i, mask=m) + tl.load(y + i, mask=m), mask=m)


@triton.jit
def k_add_oob(x, y, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i) + tl.load(y + i), mask=i < n)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
)
@pytest.mark.parametrize("n", [1000, 1024, 1, 4097])
def test_add(dtype, n):
    x = (torch.randn(n) * 50).to(dtype)
    y = (torch.randn(n) * 50).to(dtype)
    o = torch.zeros(n, dtype=dtype)
    r = run(k_add, (cdiv(n, 256),), x, y, o, n, B=256)
    assert torch.equal(o, x + y)
    assert r.footprint_written["o"] == n * o.element_size()


def test_add_views():
    base = torch.randn(2000)
    x, y, o = base[1:1001], base[1000:2000], torch.zeros(1003)[3:]  # misaligned views
    run(k_add, (4,), x, y, o, 1000, B=256)
    assert torch.equal(o, x + y)


def test_add_oob():
    x, y, o = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with pytest.raises(ptxsim.OutOfBoundsError, match="past the end of"):
        run(k_add_oob, (4,), x, y, o, 1000, B=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,warps", [(33, 1), (777, 4), (1000, 8)])
def test_softmax(dtype, n, warps):
    x = torch.randn(17, n).to(dtype)
    o = torch.zeros(17, n, dtype=dtype)
    run(
        k_softmax,
        (17,),
        x,
        o,
        n,
        n,
        n,
        B=triton.next_power_of_2(n),
        num_warps=warps,
        checks="strict",
    )
    torch.testing.assert_close(
        o.double(), x.double().softmax(1), atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-3
    )


@triton.jit
def k_math(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0.5)
    tl.store(o + i, tl.exp2(v), mask=m)
    tl.store(o + n + i, tl.log2(tl.abs(v) + 0.5), mask=m)
    tl.store(o + 2 * n + i, tl.cos(v), mask=m)
    tl.store(o + 3 * n + i, tl.sin(v * 100), mask=m)
    tl.store(o + 4 * n + i, libdevice.acos(v), mask=m)
    tl.store(o + 5 * n + i, libdevice.tanh(v), mask=m)
    tl.store(o + 6 * n + i, tl.sqrt(tl.abs(v)), mask=m)
    tl.store(o + 7 * n + i, tl.rsqrt(tl.abs(v) + 0.1), mask=m)
    tl.store(o + 8 * n + i, tl.erf(v), mask=m)
    tl.store(o + 9 * n + i, tl.sigmoid(v), mask=m)
    tl.store(o + 10 * n + i, libdevice.log1p(v + 1), mask=m)
    tl.store(o + 11 * n + i, tl.floor(v * 10) + tl.ceil(v * 7), mask=m)
    tl.store(o + 12 * n + i, libdevice.pow(tl.abs(v) + 0.5, v), mask=m)
    tl.store(o + 13 * n + i, v / (v + 3.0), mask=m)
    tl.store(o + 14 * n + i, libdevice.asin(v), mask=m)
    tl.store(o + 15 * n + i, tl.fma(v, v, v), mask=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_math(dtype):
    n = 700
    x = torch.rand(n, dtype=dtype) * 2 - 1
    x[:5] = torch.tensor([0.0, 1.0, -1.0, 1e-4, -0.999], dtype=dtype)
    o = torch.zeros(16, n, dtype=dtype)
    run(k_math, (cdiv(n, 256),), x, o, n, B=256)
    v = x.double()
    h = (x * 100).double()
    ref = [
        v.exp2(),
        (v.abs() + 0.5).log2(),
        v.cos(),
        h.sin(),
        v.acos(),
        v.tanh(),
        v.abs().sqrt(),
        (v.abs() + 0.1).rsqrt(),
        torch.erf(v),
        v.sigmoid(),
        (v + 1).log1p(),
        (x * 10).floor().double() + (x * 7).ceil().double(),
        (v.abs() + 0.5) ** v,
        v / (v + 3),
        v.asin(),
        v * v + v,
    ]
    tol = 2e-6 if dtype == torch.float32 else 1e-12
    for k, r in enumerate(ref):
        # float64 exp2/log2-style functions and literals go through float32 constants in Triton
        t = max(tol, 2e-6) if k in (7, 12) else tol
        torch.testing.assert_close(
            o[k].double(), r, atol=t, rtol=t, msg=lambda s, k=k: f"function {k}: {s}"
        )


@triton.jit
def k_types(x, o, s, flag, t, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i, mask=i < n, other=0).to(tl.float32) * s
    if flag:
        v = v + t
    tl.store(o + i, v, mask=i < n)


def test_scalar_arguments():
    x = torch.randint(-128, 127, (300,), dtype=torch.int8)
    o = torch.zeros(300)
    run(k_types, (2,), x, o, 0.5, True, 2**40, 300, B=256)
    torch.testing.assert_close(o, x.float() * 0.5 + 2**40)
    run(k_types, (2,), x, o, 3, False, 1, 300, B=256)
    torch.testing.assert_close(o, x.float() * 3)


@triton.jit
def k_assert(x, n):
    i = tl.arange(0, 128)
    v = tl.load(x + i)
    tl.device_assert(v < n, "too big")
    tl.store(x + i, v + 1)


def test_device_assert():
    x = torch.zeros(128, dtype=torch.int32)
    run(k_assert, (1,), x, 10, options=dict(debug=True))
    x[77] = 50
    with pytest.raises(ptxsim.DeviceAssertError, match="too big"):
        run(k_assert, (1,), x, 10, options=dict(debug=True))


def test_sm90_mma_level():
    """A kernel without tl.dot has nothing Hopper-specific when compiled for sm_90."""
    x = torch.randn(17, 500)
    o = torch.zeros(17, 500)
    run(k_softmax, (17,), x, o, 500, 500, 500, B=512, target=90)
    torch.testing.assert_close(o, x.softmax(1))


@triton.jit
def k_gather(x, idx, o, n, stride, D: tl.constexpr):
    r = tl.program_id(0)
    j = tl.load(idx + r)
    c = tl.arange(0, D)
    tl.store(o + r * D + c, tl.load(x + j * stride + c))


def test_int64_offsets():
    x = torch.randn(100, 64, dtype=torch.float32)
    idx = torch.randint(0, 100, (30,), dtype=torch.int64)
    o = torch.zeros(30, 64)
    run(k_gather, (30,), x, idx, o, 30, 64, D=64, num_warps=2)
    assert torch.equal(o, x[idx])
    idx[3] = 2**33  # must not wrap at 32 bits
    with pytest.raises(ptxsim.OutOfBoundsError):
        run(k_gather, (30,), x, idx, o, 30, 64, D=64, num_warps=2)


@triton.jit
def k_cumsum_sort(x, o, p, q, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, tl.cumsum(v, 0))
    tl.store(p + i, tl.sort(v))
    tl.store(q, tl.argmax(v, 0))


def test_scan_sort_argmax():
    x = torch.randn(256)
    o, p, q = torch.zeros(256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    run(k_cumsum_sort, (1,), x, o, p, q, B=256, num_warps=4, checks="strict")
    torch.testing.assert_close(o, x.cumsum(0), atol=1e-4, rtol=1e-5)
    assert torch.equal(p, x.sort().values) and q.item() == x.argmax().item()


@triton.heuristics({"B": lambda a: triton.next_power_of_2(a["n"])})
@triton.jit
def k_heur(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def test_heuristics():
    x, o = torch.randn(100), torch.zeros(100)
    run(k_heur, (1,), x, o, 100)
    assert torch.equal(o, x * 2)


@triton.jit(noinline=True)
def helper(p, k):
    return tl.load(p) * k + 1.0


@triton.jit
def k_noinline(x, o, k, B: tl.constexpr):
    i = tl.arange(0, B)
    s = helper(x + 3, k)
    n = 0
    while n < 3:
        s += helper(x + n, 0.5)
        n += 1
    if tl.program_id(0) == 0:
        tl.device_print("k =", n)
    tl.store(o + i, tl.load(x + i) + s)


def test_noinline_and_print():
    x, o = torch.randn(32), torch.zeros(32)
    r = run(k_noinline, (2,), x, o, 2.0, B=32, num_warps=1)
    torch.testing.assert_close(o, x + x[3] * 2 + 1 + x[:3].sum() * 0.5 + 3)
    assert len(r.printed) == 32 and "k =" in r.printed[0] and r.printed[0].strip().endswith("3")
    assert r.instructions["call"] > 0


@triton.jit
def simulated_double(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_simulated_launches_runs_a_launcher_unchanged():
    from tools.ptxsim.triton_adapter import simulated_launches

    x = torch.randn(1000)
    out = torch.full_like(x, float("nan"))
    seen = []
    with simulated_launches(on_result=lambda name, r: seen.append((name, r.stats.instructions))):
        simulated_double[(triton.cdiv(1000, 256),)](x, out, 1000, BLOCK=256, num_warps=2)
    assert torch.equal(out, 2 * x)
    assert [name for name, _ in seen] == ["simulated_double"]
