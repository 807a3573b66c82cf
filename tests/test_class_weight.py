# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares weights of classes with F.cross_entropy, in calls, heads and over ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels import ArcFace, MarginSoftmaxHead, NSoftmax, margin_cross_entropy
from tests.support import workers
from tests.support.losses import C, operands
from tests.support.sharding import my_rows

F32, F64 = torch.float32, torch.float64


def weights(dtype=F64):
    weight = torch.linspace(0.1, 3, C, dtype=dtype)
    weight[::7] = 0
    return weight


def problem(dtype=F64):
    x, w, y = operands(dtype=dtype)
    y[::5] = -100
    return x, w, y


def dense(x, w, y, reduction, sample_weight=None):
    logits = 16 * F.normalize(x.double()) @ F.normalize(w.double()).T
    if sample_weight is None:
        return F.cross_entropy(logits, y, weights(), reduction=reduction)
    rows = F.cross_entropy(logits, y, weights(), reduction="none") * sample_weight
    weight = torch.where(y >= 0, weights()[y.clamp_min(0)] * sample_weight, 0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weight.sum()}[reduction]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kept", ["kept", "all"])
def test_as_cross_entropy(reduction, weighted, kept, backend, device):
    x, w, y = problem(F32)
    if kept == "all":
        y = torch.where(y < 0, 3, y)
    sample_weight = torch.rand(len(x)) if weighted else None
    leaves = [t.double().requires_grad_() for t in (x, w)]
    exact = dense(*leaves, y, reduction, None if sample_weight is None else sample_weight.double())
    ours = [t.to(device).requires_grad_() for t in (x, w)]
    settings = dict(class_weight=weights(F32).to(device), reduction=reduction, backend=backend)
    if sample_weight is not None:
        settings["sample_weight"] = sample_weight.to(device)
    loss = margin_cross_entropy(*ours, y.to(device), margin=NSoftmax(), scale=16.0, **settings)
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    slopes = torch.autograd.grad(loss.sum(), ours)
    for slope, expected in zip(slopes, torch.autograd.grad(exact.sum(), leaves), strict=True):
        torch.testing.assert_close(slope.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_keeps_saves_and_replaces_them():
    x, _, y = problem()
    settings = dict(margin=ArcFace(0.2), scale=16.0, dtype=F64)
    head = MarginSoftmaxHead(8, C, class_weight=weights(), **settings)
    expected = margin_cross_entropy(
        x, head.weight, y, margin=ArcFace(0.2), scale=16.0, class_weight=weights()
    )
    torch.testing.assert_close(head(x, y), expected)
    assert torch.equal(head.state_dict()["class_weight"], weights())
    head.class_weight.zero_()
    assert head(x, y) == 0
    head.reset_parameters()
    assert torch.equal(head.class_weight, weights())
    head.class_weight = None
    torch.testing.assert_close(
        head(x, y), margin_cross_entropy(x, head.weight, y, margin=ArcFace(0.2), scale=16.0)
    )
    head.class_weight = weights()
    with pytest.raises(ValueError, match=rf"class_weight: expected shape \({C + 2},\)"):
        head.extend(2)
    head.class_weight = torch.cat([weights(), torch.ones(2, dtype=F64)])
    head.extend(2)
    assert head(x, y) > 0


def over_ranks():
    """Compares the loss and gradients of a sharded head with those of a whole one."""
    x, w, y = problem()
    part = my_rows(len(x))
    results = []
    for sharding, rows in ((dist.group.WORLD, part), (None, slice(None))):
        head = MarginSoftmaxHead(
            8, C, margin=ArcFace(0.2), scale=16.0, dtype=F64, class_weight=weights(),
            sharding=sharding,
        )  # fmt: skip
        head.load_state_dict({"weight": w, "class_weight": weights()})
        leaf = x[rows].clone().requires_grad_()
        loss = head(leaf, y[rows])
        slope, dw = torch.autograd.grad(loss, [leaf, head.weight])
        whole = dw.full_tensor() if sharding is not None else dw
        world = dist.get_world_size() if sharding is not None else 1
        results.append([loss, slope[part] if sharding is None else slope / world, whole])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_classes_of_all_ranks():
    workers.run(2, over_ranks)


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(class_weight=torch.ones(3)), ValueError, ["class_weight:", f"({C},)", "(3,)"]),
        (dict(class_weight=0.5), TypeError, ["class_weight:", "tensor", "float"]),
        (dict(class_weight=-torch.ones(C)), ValueError, ["class_weight:", ">= 0", "-1"]),
        (
            dict(class_weight=torch.ones(C), label_smoothing=0.1),
            ValueError,
            ["class_weight:", "None", "label_smoothing"],
        ),
        (
            dict(class_weight=torch.ones(C, requires_grad=True)),
            ValueError,
            ["class_weight:", "constants"],
        ),
        (
            dict(class_weight=torch.ones(C), y=torch.zeros(40, 2, dtype=torch.int64)),
            ValueError,
            ["class_weight:", "None", "label_weights"],
        ),
    ],
)
def test_refusals(settings, error, words):
    x, w, y = operands(dtype=F32)
    call = dict(x=x, w=w, y=y, margin=NSoftmax(), scale=8.0) | settings
    with pytest.raises(error) as raised:
        margin_cross_entropy(**call)
    assert all(word in str(raised.value) for word in words), raised.value
