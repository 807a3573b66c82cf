# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests one-versus-rest losses beyond their values: the bias, the scale, stability, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from marginkernels import MarginSchedule, MarginSoftmaxHead, Rows, SphereFace2, UnifiedCE
from marginkernels.functional import margin_cross_entropy
from marginkernels.transforms import TRANSFORMS
from tests.support.losses import C, operands

F32, F64 = torch.float32, torch.float64
MAKE = {
    "C": lambda: SphereFace2(0.3, bias=-2.5),
    "A": lambda: SphereFace2(0.2, kind="A", bias=-2.5),
    "unified": lambda: UnifiedCE(C),
}


def dense(kind, x, w, y, scale, bias):
    """Returns the mean loss by the formulas of the papers, with scale and bias as leaves."""
    c = F.normalize(x) @ F.normalize(w).T
    own = F.one_hot(y, len(w)).to(c)
    positive, negative = (1.0, 1.0) if kind == "unified" else (0.7, 0.3)
    if kind == "unified":
        logits = scale * (c - 0.4 * own) - bias
    elif kind == "C":
        logits = scale * (2 * ((c + 1) / 2) ** 3 - 1 + 0.3 * (1 - 2 * own)) + bias
    else:
        theta = torch.acos(c)
        turned = torch.where(own > 0, torch.cos(theta + 0.2), torch.cos(theta - 0.2))
        past = c - 1 - math.cos(math.pi - 0.2)
        turned = torch.where((own > 0) & (theta > math.pi - 0.2), past, turned)
        logits = scale * (2 * ((turned + 1) / 2) ** 3 - 1) + bias
    terms = F.binary_cross_entropy_with_logits(logits, own, reduction="none")
    return (terms * (positive * own + negative * (1 - own))).sum(1).mean()


@pytest.mark.parametrize("kind", MAKE)
def test_bias_and_scale_learn_together(kind, backend, device):
    x, w, y = operands()

    def slopes(dtype, backend=None):
        margin = MAKE[kind]()
        scale = torch.tensor(16.0, dtype=dtype, requires_grad=True)
        leaves = [x.to(dtype), w.to(dtype)]
        if backend is None:
            bias = margin.bias.detach().to(dtype).requires_grad_()
            return torch.autograd.grad(dense(kind, *leaves, y, scale, bias), (scale, bias))
        scale = torch.tensor(16.0, dtype=dtype, device=device, requires_grad=True)
        margin.to(device, dtype)
        given = [t.to(device) for t in (*leaves, y)]
        loss = margin_cross_entropy(*given, margin=margin, scale=scale, backend=backend)
        return torch.autograd.grad(loss, (scale, margin.bias))

    exact = slopes(F64)
    torch.testing.assert_close(slopes(F64, "reference"), exact)
    for ours, expected in zip(slopes(F32, backend), exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("scale", [1e-3, 64.0, 3000.0])
def test_stable_at_any_scale(scale, kind, backend, device):
    x, w, y = operands(dtype=F32)
    margin, exact = MAKE[kind](), MAKE[kind]().double()
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    given = [t.to(device) for t in (*leaves, y)]
    loss = margin_cross_entropy(*given, margin=margin.to(device), scale=scale, backend=backend)
    gradients = torch.autograd.grad(loss, [*leaves, margin.bias])
    wide = [t.double().requires_grad_() for t in (x, w)]
    expected = margin_cross_entropy(*wide, y, margin=exact, scale=scale, backend="reference")
    slopes = torch.autograd.grad(expected, [*wide, exact.bias])
    for ours, judge in zip((loss, *gradients), (expected, *slopes), strict=True):
        error = (ours.cpu().double() - judge).norm()
        # a logit is rounded to a unit in its own last place
        assert error <= (1e-5 + 3e-7 * scale) * judge.norm()


def test_the_first_bias_balances_target_and_others():
    for t, m, scale in ((3, 0.4, 40.0), (2, 0.2, 32.0)):
        margin, classes = SphereFace2(m, t=t), 1000
        bias = margin.first_bias(classes, scale)
        value = 2 * 0.5**t - 1
        target = 0.7 / (1 + math.exp(scale * (value - m) + bias))
        others = 0.3 * (classes - 1) / (1 + math.exp(-scale * (value + m) - bias))
        assert target == pytest.approx(others, rel=1e-9)
    assert UnifiedCE(1000, rate=0.1).bias.item() == pytest.approx(math.log(1000))


@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_first_bias_of_angular_margins_and_of_few_classes(scale, classes):
    for margin in (SphereFace2(0.4), SphereFace2(0.2, kind="A"), SphereFace2(2.0, kind="A", t=1)):
        bias = torch.tensor(margin.first_bias(classes, scale), dtype=F64)
        rows = Rows(torch.zeros(1, dtype=torch.int64), torch.ones(1), None, None,
                    scale=torch.tensor(scale, dtype=F64))  # fmt: skip
        right = torch.zeros(1, 1, dtype=F64)
        target = scale * margin.double()(right[0], rows)
        name, *operands = margin.negatives(right[0], rows)
        other = scale * TRANSFORMS[name].function(right, *operands)[0][0]
        pulls = margin.positive * (-target - bias).sigmoid()
        pushes = margin.negative * (classes - 1) * (other + bias).sigmoid()
        torch.testing.assert_close(pulls, pushes)


def test_a_balance_that_is_set_later_holds_from_the_next_step():
    x, w, y = operands(dtype=F32)
    margin, other = SphereFace2(balance=0.5), SphereFace2(balance=0.7, weight=2.0)
    margin.balance, margin.weight = 0.7, 2.0
    losses = [margin_cross_entropy(x, w, y, margin=given, scale=8.0) for given in (margin, other)]
    assert losses[0] == losses[1]


def test_a_first_bias_needs_another_class_and_a_share_of_both():
    with pytest.raises(ValueError, match=r"num_classes: .* got 1"):
        SphereFace2().first_bias(1, 40.0)
    with pytest.raises(ValueError, match=r"balance: .* got 1"):
        SphereFace2(balance=1.0).first_bias(10, 40.0)


def test_a_head_trains_saves_and_resets_the_bias():
    head = MarginSoftmaxHead(8, C, margin=SphereFace2(bias=-3.0), scale=32.0)
    assert "margin.bias" in head.state_dict()
    x, _, y = operands(dtype=F32)
    head(x, y).backward()
    assert head.margin.bias.grad.abs() > 0
    with torch.no_grad():
        head.margin.bias.fill_(1.0)
    head.reset_parameters()
    assert head.margin.bias == -3
    schedule = MarginSchedule(head.margin, initial=0.0, final=0.2, finish=2)
    schedule.step()
    schedule.step()
    assert head.margin.m == 0.2


@pytest.mark.parametrize(
    "make, settings, words",
    [
        (lambda: SphereFace2(kind="M"), {}, ["kind:", "'C' or 'A'", "'M'"]),
        (lambda: SphereFace2(t=0), {}, ["t:", "positive integer", "0"]),
        (lambda: SphereFace2(balance=1.5), {}, ["balance:", "[0, 1]", "1.5"]),
        (SphereFace2, dict(label_smoothing=0.1), ["label_smoothing:", "SphereFace2", "0.1"]),
        (SphereFace2, dict(z_loss=0.1), ["z_loss:", "SphereFace2", "0.1"]),
        (SphereFace2, dict(focal_gamma=2.0), ["focal_gamma:", "SphereFace2", "2.0"]),
        (SphereFace2, dict(normalize="none"), ["normalize:", "'both'", "SphereFace2"]),
        (SphereFace2, dict(row_margin=torch.ones(40)), ["row_margin:", "SphereFace2", "one m"]),
    ],
)
def test_refusals(make, settings, words):
    x, w, y = operands(dtype=F32)
    with pytest.raises(ValueError) as raised:
        margin_cross_entropy(x, w, y, margin=make(), scale=8.0, **settings)
    assert all(word in str(raised.value) for word in words), raised.value
