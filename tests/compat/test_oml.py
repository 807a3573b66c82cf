# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the fused ArcFace losses with OML's formulas, and with OML where it can be imported."""

import pytest
import torch
import torch.nn.functional as F

from marginkernels.compat.oml import ArcFaceLoss, ArcFaceLossWithMLP

C, D, N, F64 = 11, 6, 9, torch.float64
CATEGORIES = {c: ("shoes", "bags", "hats")[c % 4 % 3] for c in range(C)}


def formula(weight, x, y, m, s, epsilon, categories, reduction):
    """Computes OML's loss from its formulas."""
    cos = F.linear(F.normalize(x), F.normalize(weight))
    theta = torch.acos(cos)
    phi = torch.where(
        theta < torch.pi - m, torch.cos(theta + m), cos - m * torch.sin(cos.new_tensor(m))
    )
    logits = s * torch.where(F.one_hot(y, C).bool(), phi, cos)
    if categories is None:
        return F.cross_entropy(logits, y, label_smoothing=epsilon, reduction=reduction)
    targets = torch.zeros_like(logits)
    for row, label in enumerate(y.tolist()):
        same = [c for c in range(C) if categories[c] == categories[label]]
        targets[row, same] = epsilon / len(same)
        targets[row, label] += 1 - epsilon
    return F.cross_entropy(logits, targets, reduction=reduction)


def batch():
    torch.manual_seed(0)
    x, y = torch.randn(N, D, dtype=F64), torch.randint(C, (N,))
    return x, y


def solve(loss, parameters, x):
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=F64).view(loss.shape)
    return [loss, *torch.autograd.grad((loss * upstream).sum(), [*parameters, x])]


@pytest.mark.parametrize("categories", [None, CATEGORIES])
@pytest.mark.parametrize("epsilon", [0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_the_formulas(categories, epsilon, reduction):
    x, y = batch()
    head = ArcFaceLoss(D, C, 0.4, 30, epsilon, categories, reduction).double()
    with torch.no_grad():
        x[0] = 0.1 * x[0] - head.weight[y[0]]  # past pi - m
    x.requires_grad_()
    theirs = formula(head.weight, x, y, 0.4, 30, epsilon, categories, reduction)
    expected = solve(theirs, [head.weight], x)
    torch.testing.assert_close(solve(head(x, y), [head.weight], x), expected)
    assert list(head.state_dict()) == ["weight"]
    cos = F.linear(F.normalize(x), F.normalize(head.weight))
    assert head.last_logs["accuracy"] == (cos.argmax(1) == y).float().mean()


@pytest.mark.parametrize("categories", [None, CATEGORIES])
@pytest.mark.parametrize("mlp", [False, True])
def test_oml_s_own_losses_load_on_either_side_and_give_the_same(mlp, categories):
    arcface = pytest.importorskip("oml.losses.arcface", exc_type=ImportError)
    arguments = (
        (D, C, [8, 5], 0.5, 64, 0.1, categories) if mlp else (D, C, 0.5, 64, 0.1, categories)
    )
    kinds = (
        (ArcFaceLossWithMLP, arcface.ArcFaceLossWithMLP)
        if mlp
        else (ArcFaceLoss, arcface.ArcFaceLoss)
    )
    torch.manual_seed(0)
    ours = kinds[0](*arguments)
    torch.manual_seed(0)
    theirs = kinds[1](*arguments)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())  # they start alike
    theirs.load_state_dict(kinds[0](*arguments).state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, y = batch()
    x.requires_grad_()
    results = [solve(loss(x, y), loss.parameters(), x) for loss in (ours.double(), theirs.double())]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)  # its soft targets are fp32
    assert ours.last_logs == theirs.last_logs


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"label2category: expected .* 11 classes, got none of 3"):
        ArcFaceLoss(D, C, label2category={c: 0 for c in range(C) if c != 3})
    with pytest.raises(ValueError, match=r"smoothing_epsilon: expected .*, got 1"):
        ArcFaceLoss(D, C, smoothing_epsilon=1)
    with pytest.raises(ValueError, match=r"reduction: expected .* got 'all'"):
        ArcFaceLoss(D, C, reduction="all")
