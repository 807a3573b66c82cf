# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests every loss against its dense definition: values, gradients, ends, composition."""

from dataclasses import replace

import pytest
import torch

import marginkernels
from marginkernels import (
    CurricularFace,
    Margin,
    MVSoftmax,
    NSoftmax,
    ParametricMargin,
    Rows,
    margin_cross_entropy,
)
from marginkernels.transforms import IDENTITY, TRANSFORMS
from tests.support import losses
from tests.support.losses import LOSSES, C, dense, fused, operands, settings_of, solve

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EACH = pytest.mark.parametrize("name", LOSSES)


def test_every_margin_and_every_transform_has_a_loss_here():
    """Guards against a margin or a transform that nothing judges."""
    margins = [loss.make() for loss in LOSSES.values()]
    exported = {
        kind
        for kind in vars(marginkernels).values()
        if isinstance(kind, type) and issubclass(kind, Margin)
    }
    assert {type(margin) for margin in margins} >= exported - {Margin, ParametricMargin}
    c, one = torch.zeros(1), torch.ones(1)
    label = torch.zeros(1, dtype=torch.int64)
    rows = Rows(label, one, None, None, scale=one[0], hardest=torch.zeros(1, 6))
    used = {m.negatives(c, rows).name for m in margins if m.transforms_negatives}
    assert used >= TRANSFORMS.keys() - {IDENTITY.name}


@pytest.mark.parametrize("kind, sub_centers", [("alone", 1), ("all", 1), ("all", 3)])
@EACH
def test_the_definition_in_fp64(name, kind, sub_centers):
    x, w, y = operands(sub_centers=sub_centers)
    loss = LOSSES[name]
    settings = settings_of(kind, len(x), loss) | dict(sub_centers=sub_centers)
    ours = solve(lambda x, w: fused(loss, x, w, y, backend="reference", **settings), x, w)
    definition = solve(lambda x, w: dense(loss, x, w, y, **settings), x, w)
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@EACH
def test_the_definition_at_all_angles(name):
    """Compares in the plane, where targets and negatives come close to -1 and 1 too."""
    x, w, y = operands(n=60, d=2)
    loss = LOSSES[name]
    ours = solve(lambda x, w: fused(loss, x, w, y, backend="reference"), x, w)
    definition = solve(lambda x, w: dense(loss, x, w, y), x, w)
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["label_smoothing", "sample_weight", "z_loss", "focal_gamma"])
@pytest.mark.parametrize("name", ["softmax", "ArcFace", "CurricularFace"])
def test_composes_with(kind, name):
    x, w, y = operands()
    loss = LOSSES[name]
    settings = settings_of(kind, len(x), loss)
    ours = solve(lambda x, w: fused(loss, x, w, y, backend="reference", **settings), x, w)
    definition = solve(lambda x, w: dense(loss, x, w, y, **settings), x, w)
    for a, b in zip(ours, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@EACH
def test_backends_stay_in_the_definitions_budget(name, dtype, backend, device):
    losses.stays_in_the_definitions_budget(name, dtype, backend, device)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=["fp16", "bf16", "fp32", "fp64"])
@EACH
def test_finite_at_the_ends(name, dtype, backend, device):
    losses.finite_at_the_ends(name, dtype, backend, device)


@EACH
def test_ignored_rows_change_nothing(name):
    x, w, y = operands()
    loss = LOSSES[name]
    if name.startswith("ElasticFace"):
        pytest.skip("the margins drawn depend on the number of rows")
    extended = torch.cat([x, torch.randn(7, x.shape[1], dtype=F64)])
    labels = torch.cat([y, torch.full((7,), -100)])
    with_them = solve(lambda x, w: fused(loss, x, w, labels, backend="reference"), extended, w)
    without = solve(lambda x, w: fused(loss, x, w, y, backend="reference"), x, w)
    torch.testing.assert_close(with_them[0], torch.cat([without[0], torch.zeros(7, dtype=F64)]))
    assert (with_them[1][-7:] == 0).all()
    # the upstream weights of `solve` differ between the two
    for row in (0, 17, 39):
        slope = [
            torch.autograd.grad(
                fused(loss, leaf, w, labels[: len(leaf)], backend="reference")[row], leaf
            )[0][row]
            for leaf in (extended.clone().requires_grad_(), x.clone().requires_grad_())
        ]
        torch.testing.assert_close(*slope)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["AirFace", "inter-class filter", "CurricularFace", "ArcNegFace"])
def test_learnable_scale(name, label_smoothing, backend, device):
    x, w, y = operands()

    def slope(function, dtype, *where, **settings):
        scale = torch.tensor(16.0, dtype=dtype, device=where[0] if where else None)
        loss = replace(LOSSES[name], scale=scale.requires_grad_())
        args = [t.to(*where) for t in (x.to(dtype), w.to(dtype), y)]
        rows = function(loss, *args, label_smoothing=label_smoothing, **settings)
        return torch.autograd.grad(rows.mean(), scale)[0].double().cpu()

    exact = slope(dense, F64)
    torch.testing.assert_close(slope(fused, F64, backend="reference"), exact)
    ours = slope(fused, F32, device, backend=backend)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


def test_statistics_are_of_the_cosines_not_of_their_transform(backend, device):
    x, w, y = (t.to(device) for t in operands(dtype=F32))
    settings = dict(scale=16.0, return_stats=True, backend=backend)
    _, plain = margin_cross_entropy(x, w, y, margin=NSoftmax(), **settings)
    _, stats = margin_cross_entropy(x, w, y, margin=CurricularFace(), **settings)
    torch.testing.assert_close(stats.target_cosine, plain.target_cosine)
    assert torch.equal(stats.correct, plain.correct) and 0 < stats.correct.sum() < len(y)


@pytest.mark.parametrize("kind", [CurricularFace, MVSoftmax])
def test_thresholds_follow_the_margins_of_classes_and_rows(kind, backend, device):
    x, w, y = (t.to(device) for t in operands(dtype=F32))
    table = torch.linspace(0.1, 0.6, C, device=device)
    settings = dict(scale=16.0, reduction="none", backend=backend)
    by_class = margin_cross_entropy(x, w, y, margin=kind(table), **settings)
    by_row = margin_cross_entropy(x, w, y, margin=kind(0.0), row_margin=table[y], **settings)
    assert torch.equal(by_class, by_row)
    for row in (0, 20, 39):
        one = margin_cross_entropy(x, w, y, margin=kind(table[y[row]].item()), **settings)
        torch.testing.assert_close(one[row], by_class[row])


@EACH
def test_one_class_and_no_rows(name, backend, device):
    """Expects a loss of 0 without negatives, whatever those would have become."""
    w, y = torch.randn(C, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    x = torch.randn(3, 8, device=device)
    # some regularise, AdaM has a table, and one-versus-rest losses judge the target by itself
    if name not in ("MagFace", "AdaM-Softmax") and LOSSES[name].binary is None:
        loss, dx, dw = solve(lambda x, w: fused(LOSSES[name], x, w, y, backend=backend), x, w[:1])
        assert (loss == 0).all() and (dx == 0).all() and (dw == 0).all()
    loss, dx, dw = solve(lambda x, w: fused(LOSSES[name], x, w, y[:0], backend=backend), x[:0], w)
    assert loss.shape == (0,) and dx.shape == (0, 8) and (dw == 0).all()


def test_focal_factor_of_a_certain_row(device):
    """Takes p = 1 exactly, where the slope of (1 - p)^gamma is infinite for gamma < 1."""
    w = torch.eye(8, device=device)
    y = torch.arange(8, device=device)
    settings = dict(margin=NSoftmax(), scale=200.0, focal_gamma=0.5, reduction="none")
    rows, dx, dw = solve(lambda x, w: margin_cross_entropy(x, w, y, **settings), 2 * w, w)
    assert (rows == 0).all() and (dx == 0).all() and (dw == 0).all()
