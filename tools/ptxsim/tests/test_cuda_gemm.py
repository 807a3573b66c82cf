# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs matrix products in kernels that nvcc compiles, with planted bugs."""

import re

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import nvcc
from tools.ptxsim.floats import bf16_to_f32, f32_to_bf16

from .operands import f32, rng


def gemm_args(M, N, K):
    A, B = f32_to_bf16(f32(M, K)), f32_to_bf16(f32(N, K))
    C = np.full((M, N), np.nan, np.float32)
    ref = bf16_to_f32(A).astype(np.float64) @ bf16_to_f32(B).astype(np.float64).T
    return A, B, C, ref


def gemm_smem(stages):
    return stages * (64 + 64) * 40 * 2


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("M,N,K", [(64, 64, 64), (100, 130, 200), (65, 3, 8)])
def test_gemm_bf16(mod, stages, M, N, K):
    A, B, C, ref = gemm_args(M, N, K)
    s = mod.launch(
        f"gemm_bf16<{stages}, 0>",
        ((N + 63) // 64, (M + 63) // 64),
        128,
        [A, B, C, M, N, K],
        shared_bytes=gemm_smem(stages),
        checks="strict",
    )
    np.testing.assert_allclose(C, ref, atol=1e-4 * np.sqrt(K), rtol=1e-5)
    tiles = ((N + 63) // 64) * ((M + 63) // 64) * ((K + 31) // 32)
    assert s.mma_flops == tiles * 2 * 64 * 64 * 32
    assert s.instructions["mma"] == tiles * 4 * 16
    assert s.bank_conflicts()["ldmatrix"] == 0  # the 80-byte pitch is conflict-free


@pytest.mark.parametrize(
    "bug,err",
    [
        (1, ptxsim.AsyncCopyError),
        (2, ptxsim.RaceError),
        (3, ptxsim.AsyncCopyError),
        (4, ptxsim.RaceError),
    ],
)
def test_gemm_bugs(mod, bug, err):
    M, N, K = 64, 64, 256
    A, B, C, _ref = gemm_args(M, N, K)
    with pytest.raises(err):
        mod.launch(
            f"gemm_bf16<3, {bug}>", (1, 1), 128, [A, B, C, M, N, K], shared_bytes=gemm_smem(3)
        )


def test_gemm_missing_wait_is_wrong_without_the_check(mod):
    M, N, K = 64, 64, 256
    A, B, C, ref = gemm_args(M, N, K)
    mod.launch(
        "gemm_bf16<3, 1>", (1, 1), 128, [A, B, C, M, N, K], shared_bytes=gemm_smem(3), checks="fast"
    )
    assert not np.allclose(C, ref, atol=0.1)


def test_mma_tf32(mod):
    A, B, C = f32(16, 8), f32(8, 8), np.zeros((16, 8), np.float32)
    mod.launch("mma_tf32", 1, 32, [A, B, C])
    np.testing.assert_allclose(C, A.astype(np.float64) @ B, atol=8 * 2e-3)
    from tools.ptxsim.floats import f32_to_tf32

    np.testing.assert_allclose(C, f32_to_tf32(A).astype(np.float64) @ f32_to_tf32(B), atol=1e-6)


def test_mma_f16_trans(mod):
    A, B, C = (
        f32(16, 16).astype(np.float16),
        f32(16, 8).astype(np.float16),
        np.zeros((16, 8), np.float16),
    )
    mod.launch("mma_f16_trans", 1, 32, [A, B, C])
    np.testing.assert_allclose(C, A.astype(np.float64) @ B, atol=2e-2)


def test_mma_s8(mod):
    A, B = (
        rng.integers(-128, 128, (16, 32)).astype(np.int8),
        rng.integers(-128, 128, (8, 32)).astype(np.int8),
    )
    C = np.zeros((16, 8), np.int32)
    mod.launch("mma_s8", 1, 32, [A, B, C])
    assert np.array_equal(C, A.astype(np.int32) @ B.T.astype(np.int32))


def test_mma_with_missing_lanes(mod):
    with pytest.raises(ptxsim.WarpSyncError):
        mod.launch("mma_tf32", 1, 24, [f32(16, 8), f32(8, 8), np.zeros((16, 8), np.float32)])


def test_assemble(ptx, request):
    arch = re.search(r"\.target (sm_\d+)", ptx).group(1)
    try:
        info = nvcc.assemble(ptx, arch)
    except FileNotFoundError:
        pytest.skip("ptxas not found")
    k = next(v for n, v in info.items() if "block_reduceILb1" in n)
    assert k["registers"] > 0 and k["shared"] == 128 and k["spill_stores"] == 0
    with pytest.raises(RuntimeError, match="ptxas"):
        nvcc.assemble(
            ptx.replace("mma.sync.aligned.m16n8k16", "mma.sync.aligned.m16n8k99", 1), arch
        )
