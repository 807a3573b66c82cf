# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests margins against textbook formulas, also at branch points and the ends of the range."""

import math

import numpy as np
import pytest
import torch

from marginkernels import (
    AMSoftmax,
    ArcFace,
    CombinedMargin,
    CosFace,
    NSoftmax,
    Rows,
    SphereFace,
    margin_cross_entropy,
)
from marginkernels.margins import safe_acos, safe_sin
from tests.support.problems import random_problem

PI = math.pi


def rows(n, row_margin=None, label=None):
    label = torch.zeros(n, dtype=torch.int64) if label is None else label
    return Rows(label, torch.ones(n), torch.ones(n), row_margin)


def monotone(a):
    k = math.floor(a / PI)
    return (-1) ** k * math.cos(a) - 2 * k


def arc(m, past):
    return lambda theta: math.cos(theta + m) if theta < PI - m else past(math.cos(theta))


# a margin, the textbook t(theta), and the angles where a branch ends
MARGINS = [
    (NSoftmax(), math.cos, []),
    (CosFace(0.35), lambda t: math.cos(t) - 0.35, []),
    (AMSoftmax(2.0), lambda t: math.cos(t) - 2, []),
    (CosFace(-0.3), lambda t: math.cos(t) + 0.3, []),
    (ArcFace(0.5), arc(0.5, lambda c: c - 0.5 * math.sin(0.5)), [PI - 0.5]),
    (
        ArcFace(0.5, branch="easy"),
        lambda t: math.cos(t + 0.5) if t < PI / 2 else math.cos(t),
        [PI / 2],
    ),
    (ArcFace(0.5, branch="none"), lambda t: math.cos(t + 0.5), []),
    (ArcFace(0.5, branch="keep"), arc(0.5, lambda c: c), [PI - 0.5]),
    (ArcFace(0.5, branch="continuous"), arc(0.5, lambda c: c - 1 - math.cos(PI - 0.5)), [PI - 0.5]),
    (ArcFace(0.5, branch="monotone"), lambda t: monotone(t + 0.5), [PI - 0.5]),
    (ArcFace(0.5, branch="clip"), lambda t: math.cos(min(t + 0.5, PI)), [PI - 0.5]),
    (ArcFace(0.0), math.cos, []),
    (ArcFace(3.1), arc(3.1, lambda c: c - 3.1 * math.sin(3.1)), [PI - 3.1]),
    (
        CombinedMargin(1.0, 0.3, 0.2),
        lambda t: arc(0.3, lambda c: c - 0.3 * math.sin(0.3))(t) - 0.2,
        [PI - 0.3],
    ),
    (CombinedMargin(0.9, 0.4, 0.15), lambda t: monotone(0.9 * t + 0.4) - 0.15, [(PI - 0.4) / 0.9]),
    (CombinedMargin(1.35, 0.2, 0.0, branch="none"), lambda t: math.cos(1.35 * t + 0.2), []),
    (SphereFace(1.7), lambda t: monotone(1.7 * t), [PI / 1.7]),
    (SphereFace(4.0), lambda t: monotone(4 * t), [PI / 4, PI / 2, 3 * PI / 4]),
]
IDS = [f"{type(m).__name__}({m.extra_repr()})" for m, _, _ in MARGINS]


@pytest.mark.parametrize("margin, formula, breaks", MARGINS, ids=IDS)
def test_value_and_slope(margin, formula, breaks):
    theta = torch.linspace(0.02, PI - 0.02, 211, dtype=torch.float64)
    theta = theta[
        (theta[:, None] - torch.tensor([*breaks, 9.0], dtype=torch.float64)).abs().amin(1) > 1e-3
    ]
    c = torch.cos(theta).requires_grad_()
    t = margin(c, rows(len(c)))
    expected = torch.tensor([formula(a) for a in theta.tolist()], dtype=torch.float64)
    torch.testing.assert_close(t.detach(), expected, rtol=0, atol=1e-13)
    (slope,) = torch.autograd.grad(t.sum(), c)
    h = 1e-5
    numeric = [
        (formula(a + h) - formula(a - h)) / (math.cos(a + h) - math.cos(a - h))
        for a in theta.tolist()
    ]
    torch.testing.assert_close(
        slope, torch.tensor(numeric, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin, formula, breaks", MARGINS, ids=IDS)
def test_finite_at_the_ends_and_at_the_breaks(margin, formula, breaks, dtype):
    angles = torch.tensor([0.0, PI, *breaks], dtype=torch.float64)
    c = torch.cat([torch.cos(angles), torch.tensor([1.002, -1.002])]).to(dtype).requires_grad_()
    t = margin(c, rows(len(c)))
    (slope,) = torch.autograd.grad(t.sum(), c)
    assert t.isfinite().all() and slope.isfinite().all()
    # fp64 alone meets the formula to 1e-6; a branch that ends at 0 or pi has one side's value there
    if dtype == torch.float64:
        ends = torch.tensor([formula(0.0), formula(PI)], dtype=dtype)
        torch.testing.assert_close(t[:2].detach(), ends, rtol=0, atol=1e-6)


def test_branches_are_continuous_where_they_say_so():
    c = torch.tensor([math.cos(PI - 0.5 - 1e-9), math.cos(PI - 0.5 + 1e-9)], dtype=torch.float64)
    jump = {
        b: float(ArcFace(0.5, branch=b)(c, rows(2)).diff().abs())
        for b in ("hard", "none", "continuous", "monotone", "keep", "clip")
    }
    assert all(jump[branch] < 1e-8 for branch in ("none", "continuous", "monotone", "clip"))
    assert jump["hard"] == pytest.approx(
        0.5 * math.sin(0.5) + math.cos(PI - 0.5) * -1 - 1, abs=1e-6
    )
    assert jump["keep"] == pytest.approx(1 + math.cos(PI - 0.5), abs=1e-6)
    theta = torch.linspace(0, PI, 3001, dtype=torch.float64)
    falling = ArcFace(0.5), ArcFace(0.5, branch="monotone")
    for margin in (SphereFace(3.3), CombinedMargin(1.7, 0.4, 0.1), *falling):
        assert (margin(torch.cos(theta), rows(3001)).diff() < 0).all(), margin


@pytest.mark.parametrize(
    "kind", [ArcFace, SphereFace, lambda m, gradient: CombinedMargin(1.2, m, gradient=gradient)]
)
def test_straight_through_keeps_the_value_and_trains_a_learnable_margin(kind):
    c = torch.linspace(-0.99, 0.99, 40, dtype=torch.float64).requires_grad_()
    m = torch.nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    exact, through = kind(m, gradient="exact"), kind(m, gradient="straight_through")
    t, exact_t = through(c, rows(40)), exact(c, rows(40))
    assert torch.equal(t, exact_t)
    dc, dm = torch.autograd.grad(t.sum(), (c, m))
    assert (dc == 1).all()
    torch.testing.assert_close(dm, torch.autograd.grad(exact_t.sum(), m)[0])


def test_tables_and_row_margins():
    c, label = torch.linspace(-0.5, 0.9, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    table = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.4]))
    margin = ArcFace(table)
    assert list(margin.state_dict()) == ["m"] and dict(margin.named_parameters())["m"] is table
    t = margin(c, rows(6, label=label))
    for i in range(6):
        torch.testing.assert_close(
            t[i : i + 1], ArcFace(table[label[i]].item())(c[i : i + 1], rows(1))
        )
    (dm,) = torch.autograd.grad(t.sum(), table)
    assert (dm != 0).all()
    assert list(CosFace(torch.tensor(0.2)).buffers()) == [torch.tensor(0.2)]
    given = rows(6, row_margin=torch.full((6,), 1.2), label=label)
    for kind in (ArcFace, CosFace, SphereFace, lambda m: CombinedMargin(0.9, m, 0.1)):
        replaced = kind(torch.tensor([1.0, 1.1, 1.3]))
        torch.testing.assert_close(replaced(c, given), kind(1.2)(c, rows(6)))


def test_numbers_of_any_kind_and_tensors_of_any_type():
    c, expected = torch.linspace(-0.9, 0.9, 7), ArcFace(1.0)(torch.linspace(-0.9, 0.9, 7), rows(7))
    margin = ArcFace(0.5)
    for m in (1, np.float32(1), np.float64(1), np.int64(1)):
        margin.m = m
        for each in (margin, ArcFace(m)):
            assert torch.equal(each(c, rows(7)), expected) and "m=1" in repr(each)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        one = torch.ones((), dtype=dtype)  # cos(1) would be rounded in the narrow types
        for given in (ArcFace(one)(c, rows(7)), ArcFace(one.expand(1).clone())(c, rows(7))):
            torch.testing.assert_close(given, expected)
        torch.testing.assert_close(ArcFace(0.5)(c, rows(7, row_margin=one.expand(7))), expected)


def test_safe_functions_are_exact_and_bounded():
    c = torch.tensor(
        [-1.0, -1 + 1e-12, -0.3, 0.0, 0.7, 1 - 1e-12, 1.0], dtype=torch.float64, requires_grad=True
    )
    torch.testing.assert_close(
        safe_acos(c).detach(), torch.acos(c.detach()), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        safe_sin(c).detach(), torch.sin(torch.acos(c.detach())), rtol=1e-9, atol=1e-15
    )
    for function in (safe_acos, safe_sin):
        (slope,) = torch.autograd.grad(function(c).sum(), c)
        assert slope.abs().max() <= 1.0001e4


class InPlace(torch.nn.Module):
    """Computes CosFace(0.3) in place, as some write it."""

    def forward(self, c, rows):
        return c.sub_(0.3)


@pytest.mark.parametrize("normalize", ["both", "none"])
def test_a_margin_may_overwrite_the_cosines(normalize, backend, device):
    problem = random_problem(12, 40, 8, device=device, normalize=normalize, scale=2.0)
    results = []
    for margin in (CosFace(torch.tensor(0.3)), InPlace()):  # in PyTorch, both
        x, w = (t.clone().requires_grad_() for t in (problem.x, problem.w))
        settings = dict(problem.settings, margin=margin, backend=backend, return_stats=True)
        loss, stats = margin_cross_entropy(x, w, problem.y, **settings)
        results.append([loss, *stats, *torch.autograd.grad(loss, [x, w])])
    assert all(map(torch.equal, *results))
