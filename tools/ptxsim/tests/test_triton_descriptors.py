# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs Triton's tensor descriptors, compiled for sm_90."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tools.ptxsim import (
    SimError,
    triton_adapter,
)
from tools.ptxsim.triton_adapter import run


@triton.jit
def k_host(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def k_device(pa, pb, pc, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    a = tl.make_tensor_descriptor(pa, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(pb, [N, K], [K, 1], [BN, BK])
    c = tl.make_tensor_descriptor(pc, [M, N], [N, 1], [BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(pc.dtype.element_ty))


@triton.jit
def k_copy3(x, o, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    o.store([1, 2, 0], x.load([0, 1, -8]) + 1)


def matmul(host, M, N, K, dtype, block, warps=4, stages=3, out=torch.float32, **kw):
    torch.manual_seed(0)
    BM, BN, BK = block
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    c = torch.full((M, N), float("nan"), dtype=out)
    grid = ((M + BM - 1) // BM, (N + BN - 1) // BN)
    kw = dict(target=90, checks="strict", num_warps=warps, num_stages=stages) | kw
    if host:
        ops = [
            TensorDescriptor.from_tensor(t, s)
            for t, s in ((a, [BM, BK]), (b, [BN, BK]), (c, [BM, BN]))
        ]
        r = run(k_host, grid, *ops, K, BM, BN, BK, **kw)
    else:
        r = run(k_device, grid, a, b, c, M, N, K, BM, BN, BK, **kw)
    return a, b, c, r


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "block,warps", [((64, 64, 64), 4), ((128, 64, 128), 8), ((64, 32, 32), 4), ((128, 128, 16), 4)]
)
def test_matmul(block, warps, dtype, host):
    a, b, c, r = matmul(host, 150, 72, 200, dtype, block, warps)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, atol=1e-4, rtol=1e-6)
    assert "wgmma" in r.instructions and r.footprint_written["c" if host else "pc"] == c.numel() * 4


def test_three_dimensions():
    x, o = torch.randn(4, 6, 24), torch.zeros(8, 8, 16)
    run(
        k_copy3,
        (1,),
        TensorDescriptor.from_tensor(x, [4, 4, 16]),
        TensorDescriptor.from_tensor(o, [4, 4, 16]),
        4,
        4,
        16,
        target=90,
        checks="strict",
    )
    ref = torch.zeros(8, 8, 16)
    ref[1:5, 2:6] = 1
    ref[1:5, 2:6, 8:] += x[:, 1:5, :8]
    assert torch.equal(o, ref)


@triton.jit
def k_specialised(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(c.dtype))


def test_warp_specialisation():
    """Warps that copy and warps that multiply meet at mbarriers."""
    torch.manual_seed(0)
    a, b, c = (
        torch.randn(128, 320).bfloat16(),
        torch.randn(64, 320).bfloat16(),
        torch.full((128, 64), float("nan")),
    )
    ops = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
    r = run(k_specialised, (2, 1), *ops, 320, 64, 64, 64, target=90, checks="strict")
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, atol=1e-4, rtol=1e-6)
    assert r.block[0] > 128 and "wgmma" in r.instructions


SPOTS = (
    r"fence\.proxy\.async\S*;|wgmma\.(?:fence|commit_group)\.sync\.aligned;|wgmma\.wait_group\.sync\.aligned\s+\d+;|"
    r"@%p\d+ mbarrier\.(?:init|arrive)[^;]*;|\{\s*\.reg \.pred complete;[^}]*\}"
)


@pytest.mark.parametrize("host", [True, False])
def test_mutations(host, monkeypatch):
    """Removes each wait and fence, and all barriers of the loop or of the end at once.

    Single barriers are redundant.
    """
    size = (64, 64, 384, torch.bfloat16, (64, 64, 64))
    _, _, good, r = matmul(host, *size)
    ptx = r.ptx
    edits = [(m.group(), ptx[: m.start()] + ptx[m.end() :]) for m in re.finditer(SPOTS, ptx)]
    top = re.search(r"\n(\$L__BB\d+_2):", ptx).start()
    for what, part in (
        ("barriers of the loop", slice(top, ptx.index("wgmma.wait_group.sync.aligned 0;", top))),
        (
            "barriers of the end",
            slice(ptx.index("wgmma.wait_group.sync.aligned 0;", top), len(ptx)),
        ),
    ):
        edits.append(
            (what, ptx[: part.start] + re.sub(r"bar\.sync\s+0;", "", ptx[part]) + ptx[part.stop :])
        )
    caught, silent = {}, []
    for what, text in edits:
        kernel = type("K", (), dict(asm=dict(ptx=text), metadata=r.kernel.metadata))
        monkeypatch.setattr(triton_adapter, "compile_kernel", lambda *a, kernel=kernel: kernel)
        triton_adapter._modules.clear()
        try:
            silent.append((what, torch.equal(matmul(host, *size)[2], good)))
        except SimError as err:
            caught[what] = type(err).__name__
    triton_adapter._modules.clear()
    assert all(ok for _, ok in silent), silent
    assert caught["barriers of the loop"] == caught["barriers of the end"] == "RaceError", caught
    assert len(silent) <= (0 if host else 1), silent  # the second fence after making descriptors
    assert {"RaceError", "AsyncMmaError", "MissingFenceError", "AsyncCopyError"} <= set(
        caught.values()
    ), (caught, silent)
