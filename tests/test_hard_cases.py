# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests inputs that break margin heads and fused cross-entropy kernels elsewhere."""

import math

import pytest
import torch

from marginkernels import ArcFace, CosFace, MagFace, NSoftmax, margin_cross_entropy, numerics
from marginkernels.margins.target import BRANCHES
from marginkernels.testing import assert_within_budget, row_errors
from tests.support import hard_cases
from tests.support.problems import Problem, random_problem

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPES = pytest.mark.parametrize("compute_dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])


@TYPES
@pytest.mark.parametrize("branch", BRANCHES)
def test_target_cosine_of_plus_and_minus_one(branch, compute_dtype, backend, device):
    w = torch.randn(40, 24, device=device)
    y = torch.arange(20, device=device)
    x = torch.cat([3 * w[:10], -0.5 * w[10:20]])
    settings = dict(margin=ArcFace(0.5, branch=branch), scale=64.0)
    problem = Problem(x, w, y, compute_dtype, settings=settings)
    got, exact, plain = problem.solve_fused(backend), problem.solve_exact(), problem.solve_plain()
    assert_within_budget("loss", got[0], [p[0] for p in plain], exact[0])
    assert_within_budget("other classes", got[2][20:], [p[2][20:] for p in plain], exact[2][20:])
    # the direction of the pull is undefined here, its length is not: on the unit sphere at most s
    # for the negatives and 2 s for the margin, times the largest upstream gradient
    for gradient, operand in zip(got[1:], (x, w), strict=True):
        length = gradient.norm(dim=1) * operand.norm(dim=1)
        assert (length[:20] <= 1.5 * 3 * 64).all()


@TYPES
@pytest.mark.parametrize("normalize", ["both", "weight", "none"])
def test_cosines_stay_within_one(normalize, compute_dtype, backend, device):
    """Takes norms of the rounded operands; those of the given ones are off by up to 4e-3."""
    w = torch.randn(30, 200, device=device)
    _, stats = margin_cross_entropy(
        2 * w, w, torch.arange(30, device=device), margin=ArcFace(), scale=1.0, backend=backend,
        normalize=normalize, compute_dtype=compute_dtype, return_stats=True,
    )  # fmt: skip
    torch.testing.assert_close(stats.target_cosine, torch.ones_like(w[:, 0]), rtol=0, atol=2e-6)


@TYPES
def test_zero_rows_have_zero_gradients_and_spoil_nothing(compute_dtype, backend, device, poisoned):
    hard_cases.zero_rows(compute_dtype, backend, device)


@TYPES
def test_norms_on_either_side_of_the_least(compute_dtype, backend, device):
    least = numerics.least_norm(compute_dtype)
    problem = random_problem(6, 40, 20, device=device, margin=ArcFace(0.5), scale=30.0)
    x, w = (torch.nn.functional.normalize(t) for t in (problem.x, problem.w))
    x[:2] *= torch.tensor([[0.9], [1.1]], device=device) * least
    w[:2] *= torch.tensor([[0.9], [1.1]], device=device) * least
    _, dx, dw = Problem(x, w, problem.y, compute_dtype, settings=problem.settings).solve_fused(
        backend
    )
    assert [bool((t == 0).all()) for t in (*dx[:3], *dw[:3])] == 2 * [True, False, False]


def test_all_rows_of_one_class_and_duplicates(backend, device):
    hard_cases.duplicates(backend, device)


@pytest.mark.parametrize("save_tiles", [False, "auto"])
def test_easy_rows_keep_relative_precision(save_tiles, backend, device):
    hard_cases.easy_rows(save_tiles, backend, device)


@pytest.mark.parametrize("scale", [64.0, 72.9, 73.0, 256.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_cosines_all_of_one_sign_at_large_scales(sign, scale, backend, device):
    hard_cases.cosines_of_one_sign(sign, scale, backend, device)


def test_small_rows_opposite_to_every_class(backend, device):
    hard_cases.small_opposite_rows(backend, device)


@pytest.mark.parametrize("compute_dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalize", ["both", "weight", "none"])
@pytest.mark.parametrize("size", [1e-10, 1e14])
def test_extreme_norms(size, normalize, compute_dtype, backend, device):
    hard_cases.extreme_norms(size, normalize, compute_dtype, backend, device)


@pytest.mark.parametrize("compute_dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(1.1e-12, 1), (1, 1.1e-12)], ids=["x", "w"])
def test_large_gradients_of_small_rows(sizes, compute_dtype, backend, device):
    """Has gradients of 1e27, from which projection takes 1e39 times the row."""
    base = random_problem(40, 61, 8, device=device)
    x, w = (
        size * torch.nn.functional.normalize(t)
        for size, t in zip(sizes, (base.x, base.w), strict=True)
    )
    weight = torch.full((40,), 1e14, device=device)
    settings = dict(margin=ArcFace(0.3), scale=10.0, sample_weight=weight)
    Problem(x, w, base.y, compute_dtype, settings=settings).check(backend)


@pytest.mark.parametrize("compute_dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_gradients_of_norms_are_wide(compute_dtype, backend, device):
    """Compares the radial gradient, which is the regulariser's alone, and beyond fp16 here."""
    x, w = torch.randn(6, 24, device=device), torch.randn(9, 24, device=device)
    x = x.to(compute_dtype).float().requires_grad_()  # so that its norm is that of the rounded row
    loss = margin_cross_entropy(
        x, w, torch.arange(6, device=device), margin=MagFace(1.0, 9.0, 0.5, 0.5), scale=16.0,
        compute_dtype=compute_dtype, reduction="sum", backend=backend,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(2.0**20, device=device))
    norm = x.detach().double().norm(dim=1)
    exact = 2**20 * 35 * (1 / 81 - 1 / norm**2)
    radial = (dx.double() * x.detach()).sum(1) / norm
    assert exact.abs().min() > 1e5
    assert (radial - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("normalize", ["weight", "none"])
def test_gradients_that_cancel_are_added_before_they_are_rounded(normalize, dtype, backend, device):
    """Takes rows along their class, which have a slope of 1e4 in their cosine twice.

    One comes through the logit, the other, with the other sign, through the norm.
    """
    w = torch.linspace(0.5, 2, 40, dtype=dtype, device=device)[:, None]
    w = w * torch.eye(24, dtype=dtype, device=device).repeat(2, 1)[:40]
    x, y = 3 * w[:20], torch.arange(20, device=device)
    settings = dict(margin=ArcFace(0.5), scale=64.0, normalize=normalize)
    half = Problem(x, w, y, settings=settings)
    wide = Problem(x.float(), w, y, dtype, settings=settings)
    dx, exact = half.solve_fused(backend)[1], half.solve_exact()[1]
    assert torch.equal(dx, wide.solve_fused(backend)[1].to(dtype))
    # in fp16 the plain path has no finite result: it is fp32's that judges
    judge = wide if dtype == BF16 else Problem(x.float(), w.float(), y, settings=settings)
    assert_within_budget("dx", dx, [draw[1] for draw in judge.solve_plain()], exact)


@pytest.mark.parametrize("n, c", [(0, 5), (1, 1), (3, 1), (1, 2)])
def test_smallest_problems(n, c, backend, device):
    hard_cases.smallest_problems(n, c, backend, device)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_take_no_part(ignore_index, backend, device):
    # C is no multiple of a block: a padded column must not pass for the target of an ignored row
    problem = random_problem(30, 83, 16, device=device, margin=ArcFace(0.3), scale=20.0)
    problem.y[problem.y == ignore_index] = 4
    kept = torch.arange(30, device=device) % 3 != 1
    y = torch.where(kept, problem.y, ignore_index)
    weight = torch.rand(30, device=device)
    settings = dict(
        problem.settings, backend=backend, ignore_index=ignore_index, label_smoothing=0.1
    )

    def gradients(x, y, weight):
        x, w = x.clone().requires_grad_(), problem.w.clone().requires_grad_()
        loss, stats = margin_cross_entropy(
            x, w, y, sample_weight=weight, return_stats=True, **settings
        )
        assert all((t[y == ignore_index] == 0).all() for t in stats)
        return loss, *torch.autograd.grad(loss, (x, w))

    loss, dx, dw = gradients(problem.x, y, weight)
    some_loss, some_dx, some_dw = gradients(problem.x[kept], problem.y[kept], weight[kept])
    assert torch.equal(y, torch.where(kept, problem.y, ignore_index))  # labels are the caller's
    torch.testing.assert_close(loss, some_loss)
    torch.testing.assert_close(dx[kept], some_dx)
    torch.testing.assert_close(dw, some_dw)
    assert (dx[~kept] == 0).all()


@TYPES
def test_nothing_to_average_is_zero(compute_dtype, backend, device):
    hard_cases.nothing_to_average(compute_dtype, backend, device)


def test_an_ignored_row_is_not_correct(backend, device):
    x = torch.ones(1, 3, device=device)
    y = torch.full((1,), -100, device=device)
    settings = dict(margin=NSoftmax(), scale=1.0, backend=backend, return_stats=True)
    # the only logit is -1, below the 0 that stands for the target which the row does not have
    _, stats = margin_cross_entropy(x, -x, y, **settings)
    assert not stats.correct.item()


@pytest.mark.parametrize("normalize", ["both", "weight", "none"])
def test_reductions_weights_and_stats_agree(normalize, backend, device):
    problem = random_problem(40, 70, 16, device=device, margin=CosFace(0.1), scale=2.0, bias=True)
    weight = torch.rand(40, device=device)
    settings = dict(problem.settings, bias=problem.bias, normalize=normalize, backend=backend)

    def loss(reduction, **more):
        operands = (problem.x, problem.w, problem.y)
        return margin_cross_entropy(*operands, reduction=reduction, **settings, **more)

    unweighted, rows = loss("none"), loss("none", sample_weight=weight)
    torch.testing.assert_close(unweighted * weight, rows)
    torch.testing.assert_close(loss("sum", sample_weight=weight), rows.sum())
    mean, stats = loss("mean", sample_weight=weight, return_stats=True)
    torch.testing.assert_close(mean, rows.sum() / weight.sum())
    assert torch.equal(stats.row_loss, unweighted)
    unit_x, unit_w = (torch.nn.functional.normalize(t) for t in (problem.x, problem.w))
    cosine = (unit_x @ unit_w.T).gather(1, problem.y[:, None])[:, 0]
    torch.testing.assert_close(stats.target_cosine, cosine)
    x = unit_x if normalize == "both" else problem.x
    w = problem.w if normalize == "none" else unit_w
    logits = 2 * x @ w.T + problem.bias
    right = logits.argmax(1) == problem.y
    assert torch.equal(stats.correct, right) and 0 < right.sum() < 40
    others = logits.scatter(1, problem.y[:, None], -torch.inf)
    torch.testing.assert_close(stats.other_logit, others.amax(1))
    assert not any(t.requires_grad for t in stats)


def test_row_margins_and_tables(backend, device):
    problem = random_problem(20, 60, 16, device=device, margin=None, scale=20.0)
    row_margin, table = torch.rand(20, device=device), torch.rand(60, device=device)

    def losses(rows, margin, row_margin=None):
        settings = dict(margin=margin, row_margin=row_margin, scale=20.0, reduction="none")
        return margin_cross_entropy(
            problem.x[rows], problem.w, problem.y[rows], backend=backend, **settings
        )

    everyone = slice(None)
    of_rows, of_table = (
        losses(everyone, ArcFace(table), row_margin),
        losses(everyone, ArcFace(table)),
    )
    for i in (0, 7, 19):
        row = slice(i, i + 1)
        torch.testing.assert_close(of_rows[row], losses(row, ArcFace(row_margin[i].item())))
        torch.testing.assert_close(of_table[row], losses(row, ArcFace(table[problem.y[i]].item())))


def test_bf16_error_does_not_grow_with_the_number_of_blocks(backend, device):
    """Expects dx to be added up in fp32: over a thousand blocks bf16 would lose a factor of 7."""
    for c in (256, 65536):
        problem = random_problem(
            8, c, 16, device=device, dtypes=(BF16, BF16, None), margin=NSoftmax(), scale=4.0
        )
        got, exact = problem.solve_fused(backend), problem.solve_exact()
        error, norm = row_errors(got[1], exact[1])
        assert (error / norm).median() < 6 * torch.finfo(BF16).eps / math.sqrt(12)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_biases(offset, backend, device):
    hard_cases.large_biases(offset, backend, device)
