# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs atomics and features of the language in Triton kernels, compiled for sm_80."""

import pytest
import torch
import triton
import triton.language as tl

from tools.ptxsim.triton_adapter import run

from .triton_kernels import cdiv


@triton.jit
def k_atomic(x, hist, mx, fs, ticket, order, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    v = tl.load(x + i, mask=m, other=0)
    tl.atomic_add(hist + v % 16, 1, mask=m)
    tl.atomic_max(mx, tl.max(v, 0))
    tl.atomic_add(fs, tl.sum(v.to(tl.float32), 0))
    tl.store(order + i, tl.atomic_add(ticket + i * 0, 1, mask=m), mask=m)


def test_atomics():
    n = 1000
    x = torch.randint(0, 100, (n,), dtype=torch.int32)
    hist, mx, fs = (
        torch.zeros(16, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1),
    )
    ticket, order = torch.zeros(1, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    run(k_atomic, (cdiv(n, 128),), x, hist, mx, fs, ticket, order, n, B=128)
    assert torch.equal(hist, torch.bincount(x % 16, minlength=16).int())
    assert mx.item() == x.max().item() and fs.item() == x.sum().item() and ticket.item() == n
    assert sorted(order.tolist()) == list(range(n))


@triton.jit
def k_atomic_half(g, idx, out, n, D: tl.constexpr):
    i = tl.program_id(0)
    c = tl.arange(0, D)
    t = tl.load(idx + i)
    tl.atomic_add(out + t * D + c, tl.load(g + i * D + c))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scatter_add(dtype):
    g = torch.randint(-4, 5, (60, 64)).to(dtype)
    idx = torch.randint(0, 7, (60,), dtype=torch.int64)
    o = torch.zeros(7, 64, dtype=dtype)
    run(k_atomic_half, (60,), g, idx, o, 60, D=64, num_warps=1)
    ref = torch.zeros(7, 64, dtype=torch.float64).index_add(0, idx, g.double())
    assert torch.equal(o.double(), ref)


@triton.jit
def k_lock(lock, counter, B: tl.constexpr):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    v = tl.load(counter)
    tl.store(counter, v + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def test_lock():
    lock, counter = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(k_lock, (6,), lock, counter, B=1, num_warps=1)
    assert counter.item() == 6


@triton.jit
def k_features(x, w8, o, h, g, rnd, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i, cache_modifier=".cg") + 0 * tl.load(x + i, eviction_policy="evict_first")
    idx = tl.load(w8 + i)
    tl.store(h + tl.arange(0, 16), tl.histogram(idx.to(tl.int32) & 15, 16))
    tl.store(g + i, tl.gather(v, (i * 7) % B, 0))
    a, b = tl.split(tl.reshape(v, (B // 2, 2)))
    tl.store(o + i, tl.interleave(b, a), eviction_policy="evict_last")
    tl.store(rnd + i, tl.rand(1234, i))
    asm = tl.inline_asm_elementwise(
        "{ .reg .b32 t; add.u32 t, $1, 1; mul.lo.u32 $0, t, 3; }",
        "=r,r",
        [idx.to(tl.int32)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    tl.store(w8 + B + i, asm.to(tl.int8))


def test_features():
    B = 256
    x, w = torch.randn(B), torch.zeros(2 * B, dtype=torch.int8)
    w[:B] = torch.randint(0, 40, (B,)).to(torch.int8)
    o, h, g, rnd = (
        torch.zeros(B),
        torch.zeros(16, dtype=torch.int32),
        torch.zeros(B),
        torch.zeros(B),
    )
    run(k_features, (1,), x, w, o, h, g, rnd, B, B=B, checks="strict")
    assert torch.equal(h, torch.bincount((w[:B] & 15).int(), minlength=16).int())
    assert torch.equal(g, x[torch.arange(B) * 7 % B])
    assert torch.equal(o, x.reshape(-1, 2).flip(1).reshape(-1))
    assert torch.equal(w[B:], ((w[:B].int() + 1) * 3).to(torch.int8))
    assert 0 <= rnd.min() < rnd.max() < 1 and abs(rnd.mean() - 0.5) < 0.06


@triton.jit
def k_fp8(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(o + i, v.to(tl.float8e5).to(tl.float32))


def test_fp8_e5m2():
    x, o = torch.randn(256) * 10, torch.zeros(256)
    run(k_fp8, (1,), x, o, 256, B=256)
    assert torch.equal(o, x.to(torch.float8_e5m2).float())
