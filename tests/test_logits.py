# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests what forward hands to backward: log-sum-exps, logits made twice, classes left out."""

import math

import pytest
import torch

from marginkernels import ArcFace, MVSoftmax, NSoftmax, margin_cross_entropy, ops
from marginkernels.testing import assert_within_budget
from tests.support import sweeps
from tests.support.backends import skip_without_tiles
from tests.support.problems import Problem, random_problem

BF16, F32 = torch.bfloat16, torch.float32


def test_lse_is_rounded_once(backend, device):
    """Compares lse with the log of the sum of the kept tiles, to half a unit in the last place.

    Backward weighs the tiles by exp(-lse).
    """
    skip_without_tiles(backend)
    n, c, scale = 200, 8, 58.0  # below 59, where exponentials are not relative to anything
    x, w = torch.ones(n, 2, device=device), torch.ones(c, 2, device=device)
    x[:, 1], w[:, 1] = torch.linspace(-1, 1, n), torch.linspace(0.1, 1, c)
    lse, *_, w_inv, tiles, _ = ops.head_fwd(backend)(
        x, w, torch.full((n,), -1, device=device), torch.tensor(scale, device=device), None,
        normalize_x=True, normalize_w=True, compute_dtype=F32, save_tiles=True, want_sum=False,
        want_max=False, transform="identity", row_parameter=None, constants=None,
    )  # fmt: skip
    tiles = tiles.T if tiles.shape[0] == c else tiles
    exact = (tiles[:n, :c].double() / w_inv.double()).sum(1).log()
    ulp = torch.nextafter(lse, 2 * lse) - lse
    summed = c * torch.finfo(F32).eps / 2
    assert lse.min() > 16 and (lse - exact).abs().le(ulp / 2 + summed).all()


@pytest.mark.parametrize("learns", ["nothing", "bias", "scale"])
@pytest.mark.parametrize("compute_dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_backward_makes_the_logits_that_forward_made(learns, compute_dtype, backend, device):
    sweeps.backward_makes_the_logits_of_forward(learns, compute_dtype, backend, device)


@pytest.mark.parametrize("compute_dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_bias_of_minus_infinity_masks_a_class(compute_dtype, backend, device):
    """Compares loss and gradients with those without the class, whose own gradients are 0."""
    problem = random_problem(23, 70, 16, device=device, margin=ArcFace(0.3), scale=8.0, bias=True)
    problem.compute_dtype = compute_dtype
    problem.y %= 60
    masked = problem.bias.clone()
    masked[60:] = -math.inf
    fewer = Problem(problem.x, problem.w[:60], problem.y, compute_dtype, problem.bias[:60])
    fewer.settings = problem.settings
    problem.bias = masked
    got = problem.solve_fused(backend)
    assert all((t[60:] == 0).all() for t in got[2:])
    exact, plain = fewer.solve_exact(), fewer.solve_plain()
    for index, name in enumerate(("loss", "dx", "dw", "dbias")):
        kept = got[index] if index < 2 else got[index][:60]
        assert_within_budget(name, kept, [p[index] for p in plain], exact[index])


def test_a_row_whose_negatives_are_all_masked_loses_nothing(backend, device):
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    y, bias = torch.full((3,), 2, device=device), torch.full((5,), -math.inf, device=device)
    bias[2] = 0.5
    problem = Problem(x, w, y, bias=bias, settings=dict(margin=NSoftmax(), scale=4.0))
    assert all((t == 0).all() for t in problem.solve_fused(backend))
    settings = dict(problem.settings, bias=bias, backend=backend, return_stats=True)
    _, stats = margin_cross_entropy(x, w, y, **settings)
    assert stats.correct.all()


def test_sum_of_logits_that_a_bias_masks(backend, device):
    sweeps.sum_of_logits_that_a_bias_masks(backend, device)


@pytest.mark.parametrize("options", ["tiles", "bias", "transform"])
def test_saved_tensors_come_back_with_other_strides(options, backend, device):
    """Unpacks every second number of a longer tensor, as hooks may that keep tensors elsewhere."""
    if options == "tiles":
        skip_without_tiles(backend)
    settings = {
        "tiles": dict(margin=ArcFace(0.3), scale=16.0, save_tiles=True),
        "bias": dict(margin=ArcFace(0.3), scale=torch.tensor(16.0, device=device), bias=True),
        "transform": dict(margin=MVSoftmax(0.4), scale=16.0),
    }[options]
    problem = random_problem(37, 150, 20, device=device, **settings)
    expected, unpacked = problem.solve_fused(backend), []

    def unpack(pair):
        unpacked.append(pair[..., 1])
        return unpacked[-1]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1), unpack):
        got = problem.solve_fused(backend)
    assert not any(t.is_contiguous() for t in unpacked if t.numel() > 1)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
