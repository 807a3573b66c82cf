# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the CUDA backend without a GPU, beside the tests that take any backend.

The tests cover the differences between GPUs, the PTX in a simulator, and the gate that reads the
machine code.
"""

import pytest
import torch

from marginkernels import ArcFace, MVSoftmax
from tests.emulation import host, simulate
from tests.support import sweeps
from tests.support.problems import random_problem
from tools.gates import cuda as gate
from tools.gates import nvcc

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
needs_nvcc = pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))

# the tile kernels with the largest tile
SAMPLES = [
    "statistics_kernel<bf16, BigTile, StatisticsOptions<mk::Identity, false, false, false>>"
    "(StatisticsCall)",
    "gradient_kernel<bf16, BigTile, mk::Identity, false>(GradientCall)",
]


@pytest.mark.parametrize("save_tiles", [False, True])
@pytest.mark.parametrize("compute_dtype", [F32, BF16])
def test_opcheck(compute_dtype, save_tiles):
    with host.executed():
        sweeps.opcheck(compute_dtype, save_tiles, host.NAME)


@pytest.mark.parametrize("multiprocessors", [1, 7, 1000])
def test_any_number_of_multiprocessors(multiprocessors):
    """Runs one block that walks all tiles of a row, several, and more than there are tiles."""
    problem = random_problem(
        150, 700, 40, dtypes=(BF16, BF16, None), margin=ArcFace(0.3), scale=32.0
    )
    with host.executed(), host.multiprocessors(multiprocessors):
        problem.check(host.NAME, save_tiles=False)


@pytest.mark.parametrize(
    "shape, dtypes, settings",
    [
        ((150, 300, 72), (BF16, F32, None), dict(margin=ArcFace(0.3))),
        ((20, 150, 40), (F32, F32, F16), dict(margin=MVSoftmax(0.3), label_smoothing=0.1)),
        ((20, 150, 40), (F32, F32, None), dict(margin=ArcFace(0.3), bias=True)),
        ((20, 450, 40), (BF16, F32, None), dict(margin=ArcFace(0.3), sub_centers=3)),
    ],
    ids=["bf16, saved tiles", "fp16, transform", "fp32, bias", "bf16, sub-centres"],
)
def test_ptx_agrees_with_the_fibers(shape, dtypes, settings):
    """Compares statistics and gradients: the arithmetic of both is exact but for exp2."""

    def step():
        torch.manual_seed(0)
        problem = random_problem(*shape, dtypes=dtypes, scale=32.0, **settings)
        problem.y //= settings.get("sub_centers", 1)  # of the rows of w
        return problem.solve_fused(host.NAME)

    by_fibers, by_ptx, counters = simulate.twice(step)
    for a, b in zip(by_fibers, by_ptx, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if b.dtype == F32 else 1e-2, atol=1e-6)
    assert counters
    for launch, stats in counters:
        assert not any(stats.bank_conflicts().values()), launch.symbol


@needs_nvcc
def test_the_gate_passes_the_largest_tiles():
    pytest.importorskip("triton", reason="its wheel brings the tools that read machine code")
    kernels = gate.kernels_of(nvcc.instances(SAMPLES), "sm_80")
    assert sum(kernel.tile is not None for kernel in kernels) == len(SAMPLES)
    for kernel in kernels:
        assert not gate.problems_of(kernel), gate.describe(kernel)
