# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Counts what a step of the Triton backend launches: a host may take longer for it than a GPU.

Steps are recorded at full size on the meta device, where a launcher that reads a number fails.
"""

import pytest
import torch

from marginkernels import ArcFace, margin_cross_entropy

pytest.importorskip("triton", reason="the package triton is not installed")

from tools.model.gpus import GPUS
from tools.model.recording import Shape, recorded

F32, BF16 = torch.float32, torch.bfloat16


def counts(n, c, weights, **settings):
    """Returns how many launches a forward and backward have inside the ops, and around them."""
    settings = dict(compute_dtype=BF16, save_tiles=False) | settings
    with torch.device("meta"):
        x, w = torch.empty(n, 512), torch.empty(c, 512, dtype=weights)
        y = torch.zeros(n, dtype=torch.int64)
    leaves = (x.requires_grad_(), w.requires_grad_())
    with recorded(Shape(n, c, 512), GPUS["H200"]) as recorder:
        loss = margin_cross_entropy(
            *leaves, y, margin=ArcFace(0.5), scale=64.0, backend="triton", **settings
        )
        torch.autograd.grad(loss, leaves)
    # a GEMM that the vendor's library splits, it also adds up: one call
    all_of_them = sum(n for launch, n in recorder.launches.items() if launch.name != "split-K sum")
    around = sum(recorder.around.values())
    return all_of_them - around, around


@pytest.mark.parametrize("weights", [F32, BF16])
@pytest.mark.parametrize(
    "n, c, sweeps, step, settings",
    [
        (256, 100_000, 13, 25, {}),
        (256, 100_000, 13, 25, dict(save_tiles=True)),
        (1024, 1_000_000, 41, 60, {}),
    ],
    ids=["100k", "100k, saved tiles", "1M"],
)
def test_a_step_has_few_launches(n, c, sweeps, step, settings, weights):
    inside, around = counts(n, c, weights, **settings)
    assert inside <= sweeps and inside + around <= step


@pytest.mark.parametrize("n", [300, 20_000])
@pytest.mark.parametrize("compute_dtype", [F32, BF16, torch.float16])
def test_launches_depend_on_shapes_alone(n, compute_dtype):
    """Records every option that adds launches; a CUDA graph replays them for other numbers."""
    bias = torch.zeros(700, device="meta", requires_grad=True)
    few = counts(n, 700, F32, compute_dtype=compute_dtype, bias=bias, label_smoothing=0.1)
    assert few[0] > 10
