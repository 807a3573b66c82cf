# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs Triton kernels with matrix products, compiled for sm_80."""

import re

import pytest
import torch
import triton
import triton.language as tl

from tools.ptxsim import AsyncCopyError, RaceError
from tools.ptxsim.triton_adapter import run

from .triton_kernels import cdiv, k_attn, matmul, rerun


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_16bit(dtype, stages, warps):
    a, b, c, r = matmul(150, 80, 208, dtype, stages, warps)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-3, rtol=1e-5)
    assert r.instructions["mma"] > 0 and r.mma_flops == 3 * 2 * 7 * 2 * 64 * 64 * 32
    if stages > 1:
        assert r.instructions["cp_async"] > 0


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("prec,tol", [("tf32", 0.05), ("tf32x3", 1e-4), ("ieee", 1e-4)])
def test_matmul_fp32(prec, tol, stages):
    a, b, c, r = matmul(70, 66, 100, torch.float32, stages, 4, prec, block=(32, 64, 32))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=tol, rtol=0)
    assert ("mma" in r.instructions) == (prec != "ieee")


@pytest.mark.parametrize("M,N,K", [(1, 1, 1), (129, 65, 17), (64, 64, 512), (37, 200, 33)])
@pytest.mark.parametrize("trans_b", [False, True])
def test_matmul_sizes(M, N, K, trans_b):
    a, b, c, _ = matmul(
        M, N, K, torch.bfloat16, 3, 4, trans_b=trans_b, out=torch.bfloat16, checks="strict"
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=2e-2, rtol=1e-2)


def test_matmul_fp64():
    a, b, c, _ = matmul(
        40,
        40,
        40,
        torch.float64,
        2,
        4,
        "ieee",
        block=(32, 32, 16),
        out=torch.float64,
        ACC=tl.float64,
    )
    torch.testing.assert_close(c, a @ b, atol=1e-12, rtol=1e-12)


def test_matmul_big_tile():
    a, b, c, r = matmul(128, 128, 512, torch.bfloat16, 3, 8, trans_b=True, block=(128, 128, 64))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-3, rtol=1e-5)
    assert r.mma_flops == 2 * 128 * 128 * 512
    assert r.footprint_read["a"] == 128 * 512 * 2 and r.efficiency() == 1.0
    assert r.bank_conflicts()["ldmatrix"] == 0
    assert r.seconds < 5


@triton.jit
def k_lse(
    X, W, LSE, B, C, s, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tl.full((BM,), float("-inf"), tl.float32)
    z = tl.zeros((BM,), tl.float32)
    for n in range(0, C, BN):
        rn = n + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            rk = k + tl.arange(0, BK)
            x = tl.load(X + rm[:, None] * D + rk[None, :], mask=(rm < B)[:, None], other=0.0)
            w = tl.load(W + rn[:, None] * D + rk[None, :], mask=(rn < C)[:, None], other=0.0)
            acc = tl.dot(x, w.T, acc)
        logits = tl.where((rn < C)[None, :], acc * s, float("-inf"))
        mn = tl.maximum(m, tl.max(logits, 1))
        z = z * tl.exp2((m - mn) * 1.4426950408889634) + tl.sum(
            tl.exp2((logits - mn[:, None]) * 1.4426950408889634), 1
        )
        m = mn
    tl.store(LSE + rm, m + tl.log(z), mask=rm < B)


@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 2e-5), (torch.float32, 2e-2)])
def test_online_logsumexp(dtype, tol):
    B, C, D = 50, 333, 128
    x, w = torch.randn(B, D).to(dtype), torch.randn(C, D).to(dtype)
    o = torch.zeros(B)
    run(
        k_lse,
        (cdiv(B, 32),),
        x,
        w,
        o,
        B,
        C,
        0.3,
        D=D,
        BM=32,
        BN=64,
        BK=32,
        num_warps=4,
        num_stages=2,
    )
    torch.testing.assert_close(
        o.double(), (0.3 * x.double() @ w.double().T).logsumexp(1), atol=tol, rtol=1e-5
    )


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_attention(stages):
    n, D = 150, 64
    q, k, v = (torch.randn(n, D).half() for _ in range(3))
    o = torch.zeros(n, D)
    run(k_attn, (cdiv(n, 64),), q, k, v, o, n, D=D, BM=64, BN=32, num_warps=4, num_stages=stages)
    ref = (q.double() @ k.double().T * 0.125).softmax(1) @ v.double()
    torch.testing.assert_close(o.double(), ref, atol=2e-3, rtol=1e-3)


def test_determinism():
    r = [matmul(100, 100, 100, torch.bfloat16, 3, 4)[3].stats for _ in range(2)]
    for k in ("instructions", "shared", "global_load_sectors", "footprint_read", "opcodes"):
        assert getattr(r[0], k) == getattr(r[1], k)


@triton.jit
def k_int8(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))


def test_int8_dot():
    a, b = (
        torch.randint(-128, 128, (32, 64)).to(torch.int8),
        torch.randint(-128, 128, (64, 32)).to(torch.int8),
    )
    c = torch.zeros(32, 32, dtype=torch.int32)
    r = run(k_int8, (1,), a, b, c, M=32, N=32, K=64)
    assert torch.equal(c, a.int() @ b.int()) and r.instructions["mma"] > 0


@triton.jit
def k_bdot(a, b, c, N: tl.constexpr):
    z, i, j = tl.arange(0, 4), tl.arange(0, N), tl.arange(0, N)
    p = z[:, None, None] * N * N + i[None, :, None] * N + j[None, None, :]
    tl.store(c + p, tl.dot(tl.load(a + p), tl.load(b + p)))


def test_batched_dot():
    a, b, c = torch.randn(4, 16, 16).half(), torch.randn(4, 16, 16).half(), torch.zeros(4, 16, 16)
    run(k_bdot, (1,), a, b, c, N=16)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)


@triton.jit
def k_splitk(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SK: tl.constexpr
):
    """Loops persistently over tiles, and splits K with fp32 atomics."""
    tiles_n = tl.cdiv(N, BN)
    total = tl.cdiv(M, BM) * tiles_n * SK
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        s = t % SK
        rm = (t // SK // tiles_n) * BM + tl.arange(0, BM)
        rn = (t // SK % tiles_n) * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(s * BK, K, BK * SK):
            rk = k + tl.arange(0, BK)
            x = tl.load(
                a + rm[:, None].to(tl.int64) * K + rk[None, :],
                mask=(rm[:, None] < M) & (rk[None, :] < K),
                other=0.0,
            )
            y = tl.load(
                b + rn[None, :].to(tl.int64) * K + rk[:, None],
                mask=(rn[None, :] < N) & (rk[:, None] < K),
                other=0.0,
            )
            acc = tl.dot(x, y, acc)
        tl.atomic_add(
            c + rm[:, None] * N + rn[None, :],
            acc,
            mask=(rm[:, None] < M) & (rn[None, :] < N),
            sem="relaxed",
        )


def test_persistent_split_k():
    M, N, K = 90, 70, 160
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N)
    run(k_splitk, (5,), a, b, c, M, N, K, BM=32, BN=32, BK=32, SK=2, num_stages=2)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_triton_matmul_mutations(stages):
    K = 256
    a, b, c, r = matmul(64, 64, K, torch.bfloat16, stages, 4, trans_b=True)
    ptx, kernel = r.ptx, r.kernel
    ref = a.double() @ b.double()
    assert torch.equal(rerun(ptx, kernel, a, b, K), c)
    spots = [m.span() for m in re.finditer(r"bar\.sync\s+0;|cp\.async\.wait_group\s+\d+;", ptx)]
    caught, silent = [], []
    for s, e in spots:
        mutant = ptx[:s] + ptx[e:]
        try:
            got = rerun(mutant, kernel, a, b, K)
            ok = torch.allclose(got.double(), ref, atol=1e-3)
            silent.append((ptx[s:e], ok))
        except (RaceError, AsyncCopyError) as err:
            caught.append((ptx[s:e], type(err).__name__))
    assert all(ok for _, ok in silent)  # whatever is not reported was redundant and changes nothing
    assert len(caught) >= max(2, len(spots) * 2 // 3), (caught, silent)
    if stages > 1:
        assert any(n == "AsyncCopyError" for _, n in caught) and any(
            n == "RaceError" for _, n in caught
        )
