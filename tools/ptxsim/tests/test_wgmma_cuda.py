# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs wgmma in CUDA C++, with planted bugs."""

from pathlib import Path

import numpy as np
import pytest

from tools.ptxsim import (
    AsyncCopyError,
    AsyncMmaError,
    MissingFenceError,
    Module,
    RaceError,
    nvcc,
)

from .operands import require_nvcc
from .wgmma_snippets import values

BUGS = {
    1: (AsyncMmaError, "cp.async into"),
    2: (MissingFenceError, "wgmma.fence"),
    3: (MissingFenceError, "proxy"),
    4: (RaceError, "no barrier"),
    5: (RaceError, "writes what warp"),
    6: (AsyncCopyError, "in flight"),
    8: (AsyncMmaError, "cp.async into"),
}
UNSWIZZLED = 7


@pytest.fixture(scope="module")
def cuda():
    require_nvcc()
    return nvcc.compile_to_ptx(Path(__file__).with_name("wgmma.cu"), arch="sm_90a")


def gemm(ptx, kind, bug=0, checks="strict"):
    (ab, a), (bb, b) = values(kind, 128, 256), values(kind, 64, 256)
    c = np.full((128, 64), np.nan, np.float32)
    name = f"gemm<{'__nv_bfloat16' if kind == 'bf16' else '__half'}, {bug}>"
    st = Module.from_ptx(ptx).launch(name, (1, 2), 128, [ab, bb, c, 64, 256], 32768, checks=checks)
    return c, a @ b.T, st


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_cuda_gemm(cuda, kind):
    c, ref, st = gemm(cuda, kind)
    np.testing.assert_allclose(c, ref, rtol=1e-5, atol=1e-4)
    assert (
        st.mma_flops == 2 * 128 * 64 * 256 and st.opcodes["wgmma.fence.sync.aligned"] == 2 * 4 * 4
    )


@pytest.mark.parametrize("bug", BUGS)
def test_cuda_bugs(cuda, bug):
    error, match = BUGS[bug]
    with pytest.raises(error, match=match):
        gemm(cuda, "bf16", bug)


def test_cuda_unswizzled(cuda):
    c, ref, _ = gemm(cuda, "bf16", UNSWIZZLED)
    assert np.abs(c - ref).max() > 5
