# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs CUDA's libraries in kernels that nvcc compiles."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.ptxsim import Module, nvcc
from tools.ptxsim.syntax.parser import parse

from .operands import f32, require_nvcc, rng


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def libs(request):
    require_nvcc()
    return parse(nvcc.compile_to_ptx(Path(__file__).with_name("libs.cu"), arch=request.param))


def test_libraries(libs):
    """cub, cooperative groups, the pipeline intrinsics and the bf16 header."""
    m = Module(libs)
    x, o, s = (
        rng.integers(-1000, 1000, 256).astype(np.int32),
        np.zeros(384, np.int32),
        np.zeros(1, np.float32),
    )
    m.launch("kcub", 1, 128, [x, o, s])
    assert s[0] == x[:128].sum() and np.array_equal(o[:128], np.cumsum(x[:128]) - x[:128])
    assert np.array_equal(o[128:], np.sort(x))
    v, o = f32(128), np.zeros(384, np.float32)
    m.launch("kcg", 1, 128, [v, o, 128])
    np.testing.assert_allclose(o[:128:32], v.reshape(4, 32).sum(1), atol=1e-5)
    assert np.array_equal(o[128:256:8], v.reshape(16, 8).max(1))
    v = f32(5 * 64, 4)
    o = np.zeros_like(v)
    m.launch("kpipe", 1, 64, [v, o, 5])
    ref = v.reshape(5, 64, 4)[:, ::-1].reshape(-1, 4).copy()
    ref[:, 0] += v[0, 1]
    assert np.array_equal(o, ref)
    a, b, o = torch.randn(64).bfloat16(), torch.randn(64).bfloat16(), torch.zeros(256).bfloat16()
    m.launch("kbf", 1, 32, [a, b, o])
    assert torch.equal(o[:64], a * b + torch.maximum(a, b)) and torch.equal(o[128:192], a - b)
    torch.testing.assert_close(o[64:128], a.exp(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(o[192:], a.abs().rsqrt(), rtol=1e-2, atol=1e-3)
