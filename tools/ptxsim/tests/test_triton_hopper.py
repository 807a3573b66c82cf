# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs Triton kernels compiled for sm_90, where tl.dot becomes wgmma."""

import re

import pytest
import torch
import triton
import triton.language as tl

from tools.ptxsim import (
    AsyncCopyError,
    AsyncMmaError,
    Checks,
    MissingFenceError,
    OutOfBoundsError,
    RaceError,
)
from tools.ptxsim.triton_adapter import run

from .triton_kernels import cdiv, k_attn, k_matmul, matmul, rerun

# Triton has put a fence.proxy.async between cp.async and wgmma since 3.7.1; before that, only after
# st.shared
FENCES_COPIES = tuple(int(x) for x in triton.__version__.split(".")[:3]) >= (3, 7, 1)


def strict():
    c = Checks.strict()
    c.copy_fence = FENCES_COPIES
    return c


@pytest.mark.parametrize(
    "block", [(64, 64, 32), (128, 64, 64), (64, 128, 64), (128, 128, 64), (64, 32, 16)]
)
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul(dtype, trans_b, warps, block):
    M, N, K = 150, 130, 208
    a, b, c, r = matmul(
        M, N, K, dtype, 3, warps, trans_b=trans_b, block=block, target=90, checks=strict()
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-6)
    tiles = cdiv(M, block[0]) * cdiv(N, block[1]) * cdiv(K, block[2])
    assert r.mma_flops == 2 * tiles * block[0] * block[1] * block[2]
    assert r.instructions["wgmma"] > 0 and "mma" not in r.instructions


@pytest.mark.parametrize("block", [(64, 64, 32), (128, 64, 32), (64, 128, 32), (64, 32, 32)])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("trans_b", [False, True])
def test_matmul_tf32(trans_b, warps, block):
    a, b, c, r = matmul(
        70,
        130,
        100,
        torch.float32,
        3,
        warps,
        "tf32",
        trans_b=trans_b,
        block=block,
        target=90,
        checks=strict(),
    )
    cut = [
        (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)
    ]
    torch.testing.assert_close(c.double(), cut[0] @ cut[1], atol=1e-4, rtol=1e-6)
    assert any("tf32" in op for op in r.opcodes)


@pytest.mark.parametrize("trans_b", [False, True])
def test_matmul_a_transposed(trans_b):
    """A is M-major in shared memory."""
    M, N, K, B = 130, 70, 100, 64
    a, b = (
        torch.randn(K, M).half().T,
        torch.randn(N, K).half().T if trans_b else torch.randn(K, N).half(),
    )
    c = torch.full((M, N), float("nan"))
    r = run(
        k_matmul,
        (cdiv(M, B), cdiv(N, B)),
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BM=B,
        BN=B,
        BK=32,
        PREC="tf32",
        target=90,
        checks=strict(),
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-6)
    assert re.search(rf"wgmma\.mma_async[^;]*, 1, 1, 1, {int(not trans_b)};", r.ptx)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages(stages):
    a, b, c, r = matmul(
        64, 64, 400, torch.bfloat16, stages, 4, block=(64, 64, 64), target=90, checks=strict()
    )
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-6)
    assert "wgmma" in r.instructions


@pytest.mark.skipif(not FENCES_COPIES, reason="Triton 3.6 does not compile it")
def test_half_accumulator():
    """Triton unpacks 16-bit accumulators between commit and wait, which PTX does not allow."""
    kw = dict(block=(64, 64, 32), target=90, out=torch.float16, ACC=tl.float16)
    with pytest.raises(AsyncMmaError, match="accumulator"):
        matmul(64, 64, 64, torch.float16, 2, 4, checks=strict(), **kw)
    a, b, c, r = matmul(64, 64, 64, torch.float16, 2, 4, checks="fast", **kw)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=5e-2, rtol=5e-3)
    assert any(".f16.f16.f16" in op for op in r.opcodes)


@triton.jit
def k_dot8(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, INT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[None, :] * K + k[:, None])
    acc = tl.dot(x, y, out_dtype=tl.int32) if INT else tl.dot(x, y)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8bit(kind):
    M, N, K = 64, 32, 64
    if kind == "int8":
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((M, K), (N, K)))
        c = torch.zeros(M, N, dtype=torch.int32)
    else:
        a, b = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((M, K), (N, K)))
        c = torch.zeros(M, N)
    r = run(k_dot8, (1,), a, b, c, M, N, K, kind == "int8", target=90, checks=strict())
    f = (lambda x: x.double()) if kind == "int8" else (lambda x: x.float().double())
    torch.testing.assert_close(c.double(), f(a) @ f(b).T, atol=1e-5, rtol=1e-6)
    assert "wgmma" in r.instructions


@pytest.mark.parametrize("warps", [4, 8])
def test_attention(warps):
    """The second product has A in registers."""
    n, D = 200, 64
    q, k, v = (torch.randn(n, D).half() for _ in range(3))
    o = torch.zeros(n, D)
    r = run(
        k_attn,
        (cdiv(n, 64 * warps // 4),),
        q,
        k,
        v,
        o,
        n,
        D=D,
        BM=64 * warps // 4,
        BN=64,
        target=90,
        num_warps=warps,
        checks=strict(),
    )
    torch.testing.assert_close(
        o.double(),
        torch.softmax(q.double() @ k.double().T / D**0.5, 1) @ v.double(),
        atol=3e-3,
        rtol=3e-3,
    )
    assert "wgmma" in r.instructions
    lines = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\{|%rd)", r.ptx)
    assert "{" in lines and "%rd" in lines


@pytest.mark.skipif(not FENCES_COPIES, reason="fixed in 3.7.1")
def test_copies_are_fenced():
    matmul(
        64,
        64,
        128,
        torch.bfloat16,
        3,
        4,
        trans_b=True,
        block=(64, 64, 64),
        target=90,
        checks="strict",
    )


@pytest.mark.skipif(FENCES_COPIES, reason="fixed in 3.7.1")
def test_copies_are_not_fenced():
    with pytest.raises(MissingFenceError, match=r"fence\.proxy\.async"):
        matmul(
            64,
            64,
            128,
            torch.bfloat16,
            3,
            4,
            trans_b=True,
            block=(64, 64, 64),
            target=90,
            checks="strict",
        )


SPOTS = (
    r"bar\.sync\s+0;|cp\.async\.wait_group\s+\d+;|wgmma\.fence\.sync\.aligned;|wgmma\.wait_group\.sync\.aligned\s+\d+;|"
    r"wgmma\.commit_group\.sync\.aligned;|fence\.proxy\.async\S*;"
)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("warps", [4, 8])
def test_mutations(warps, stages):
    """Each barrier, wait or fence that is removed is noticed, or the result is the same."""
    K = 256
    block = (64, 64, 64) if warps == 4 else (128, 64, 64)
    a, b, c, r = matmul(
        block[0],
        64,
        K,
        torch.bfloat16,
        stages,
        warps,
        trans_b=True,
        block=block,
        target=90,
        checks=strict(),
    )
    ptx, kernel = r.ptx, r.kernel
    ref = a.double() @ b.double()

    def again(text):
        return rerun(text, kernel, a, b, K, block, checks=strict())

    assert torch.equal(again(ptx), c)
    caught, silent = [], []
    for m in re.finditer(SPOTS, ptx):
        try:
            got = again(ptx[: m.start()] + ptx[m.end() :])
            silent.append((m.group(), torch.allclose(got.double(), ref, atol=1e-3)))
        except (RaceError, AsyncCopyError, AsyncMmaError, MissingFenceError) as err:
            caught.append((m.group(), type(err).__name__))
    assert all(ok for _, ok in silent), silent
    names = {n for _, n in caught}
    assert {"RaceError", "AsyncMmaError", "MissingFenceError"} <= names, (caught, silent)
    fences = [s for s, _ in caught if s.startswith(("wgmma", "fence"))]
    assert len(fences) >= len(re.findall(r"wgmma\.(?:fence|commit)|fence\.proxy", ptx)), (
        caught,
        silent,
    )


def test_wrong_descriptor():
    """Another swizzle or stride in the descriptors that Triton builds gives wrong results."""
    a, b, _c, r = matmul(
        64,
        64,
        128,
        torch.bfloat16,
        2,
        4,
        trans_b=True,
        block=(64, 64, 64),
        target=90,
        checks=strict(),
    )
    ref = a.double() @ b.double()
    good = re.search(r"or\.b64\s+%rd\d+, %rd\d+, (46116862\d+);", r.ptx).group(1)
    for wrong in (int(good) ^ 3 << 62, int(good) ^ 1 << 62, int(good) ^ 1 << 37):
        try:
            got = rerun(
                r.ptx.replace(good, str(wrong)), r.kernel, a, b, 128, (64, 64, 64), checks="fast"
            )
        except OutOfBoundsError:
            continue
        assert (got.double() - ref).abs().max() > 1
