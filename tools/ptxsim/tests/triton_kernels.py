# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the Triton kernels that several test modules run."""

import torch
import triton
import triton.language as tl

from tools.ptxsim import Device, Module
from tools.ptxsim.triton_adapter import run


def cdiv(a, b):
    return (a + b - 1) // b


@triton.jit
def k_softmax(x, o, n, sx, so, B: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    v = tl.load(x + r * sx + c, mask=c < n, other=float("-inf")).to(tl.float32)
    v = v - tl.max(v, 0)
    e = tl.exp(v)
    tl.store(o + r * so + c, (e / tl.sum(e, 0)).to(o.dtype.element_ty), mask=c < n)


@triton.jit
def k_matmul(
    a,
    b,
    c,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    scm,
    scn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PREC: tl.constexpr,
    ACC: tl.constexpr = tl.float32,
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        x = tl.load(
            a + rm[:, None] * sam + rk[None, :] * sak,
            mask=(rm[:, None] < M) & (rk[None, :] < K),
            other=0.0,
        )
        y = tl.load(
            b + rk[:, None] * sbk + rn[None, :] * sbn,
            mask=(rk[:, None] < K) & (rn[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(
        c + rm[:, None] * scm + rn[None, :] * scn,
        acc.to(c.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


def matmul(
    M,
    N,
    K,
    dtype,
    stages,
    warps,
    prec="tf32",
    trans_b=False,
    block=(64, 64, 32),
    out=torch.float32,
    **kw,
):
    a = torch.randn(M, K).to(dtype)
    b = torch.randn(N, K).to(dtype).T if trans_b else torch.randn(K, N).to(dtype)
    c = torch.full((M, N), float("nan"), dtype=out)
    BM, BN, BK = block
    r = run(
        k_matmul,
        (cdiv(M, BM), cdiv(N, BN)),
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BM=BM,
        BN=BN,
        BK=BK,
        PREC=prec,
        num_stages=stages,
        num_warps=warps,
        **kw,
    )
    return a, b, c, r


@triton.jit
def k_attn(Q, K, V, out, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(Q + rm[:, None] * D + d[None, :], mask=rm[:, None] < n, other=0.0)
    m = tl.full((BM,), float("-inf"), tl.float32)
    z = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for s in range(0, n, BN):
        rn = s + tl.arange(0, BN)
        k = tl.load(K + rn[:, None] * D + d[None, :], mask=rn[:, None] < n, other=0.0)
        v = tl.load(V + rn[:, None] * D + d[None, :], mask=rn[:, None] < n, other=0.0)
        logits = tl.where(rn[None, :] < n, tl.dot(q, k.T) * 0.125, float("-inf"))
        mn = tl.maximum(m, tl.max(logits, 1))
        p = tl.exp(logits - mn[:, None])
        a = tl.exp(m - mn)
        z = z * a + tl.sum(p, 1)
        acc = acc * a[:, None] + tl.dot(p.to(v.dtype), v)
        m = mn
    tl.store(out + rm[:, None] * D + d[None, :], acc / z[:, None], mask=rm[:, None] < n)


def rerun(ptx, kernel, a, b, K, block=(64, 64), **kw):
    dev = Device()
    M, N = a.shape[0], b.shape[1]
    c = torch.full((M, N), float("nan"))
    m = Module.from_ptx(ptx, dev)
    args = [
        dev.alloc(a),
        dev.alloc(b),
        dev.alloc(c),
        M,
        N,
        K,
        a.stride(0),
        b.stride(1),
        c.stride(0),
        0,
        0,
    ]
    prog = m.program(kernel.metadata.name)
    assert len(prog.params) == len(args)
    grid = (cdiv(M, block[0]), cdiv(N, block[1]))
    m.launch(
        kernel.metadata.name,
        grid,
        kernel.metadata.num_warps * 32,
        args,
        kernel.metadata.shared,
        **kw,
    )
    return c
