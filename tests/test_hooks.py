# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks that modules of a user's own get the hooks of a margin or a scale, or a clear error."""

import pytest
import torch

from marginkernels import (
    AdaCos,
    ArcFace,
    ElasticFace,
    Margin,
    MarginSoftmaxHead,
    NSoftmax,
    PartialFC,
    margin_cross_entropy,
)
from marginkernels.margins import InterClassFilter
from marginkernels.transforms import Transform
from tests.support.losses import C, operands, solve


class Everything:
    """Uses every hook: drawn margins, filtered negatives, a regularizer."""

    takes_row_margin = False
    needs_target_cosine = False

    def forward(self, c, rows):
        return c - 0.1 * rows.noise.to(c.dtype)

    def negatives(self, c, rows):
        return Transform("interclass_filter", None, rows.x_norm.new_full((1,), 0.2))

    def regularizer(self, rows):
        return 0.5 * rows.x_norm

    def draw(self, x, rank=0):
        return torch.linspace(0, 1, len(x))


class Foreign(Everything, torch.nn.Module):
    check, bounded, name = True, 3.0, "its own"  # which mean nothing to the library


class Own(Everything, Margin):
    def check(self, num_classes, device=None, row_margin=None):
        if num_classes != C:
            raise ValueError(f"margin: expected {C} classes, got {num_classes}")


class Bare(torch.nn.Module):
    def forward(self, c, rows):
        return c - 0.1


def losses(margin, **settings):
    x, w, y = operands()

    def function(x, w):
        return margin_cross_entropy(
            x, w, y, margin=margin, scale=16.0, reduction="none", **settings
        )

    return solve(function, x, w)


def test_a_module_of_the_users_own_has_the_hooks_that_it_defines():
    for foreign, own in zip(losses(Foreign()), losses(Own()), strict=True):
        assert torch.equal(foreign, own)
    plain = losses(Bare())
    assert not torch.equal(losses(Foreign())[0], plain[0])
    assert all(map(torch.equal, losses(InterClassFilter(Bare(), 1.0)), plain))


def test_a_norm_that_negatives_has_seen_has_its_gradient():
    class Blind(Own):
        def negatives(self, c, rows):
            return Transform("interclass_filter", None, torch.full((1,), 0.2, dtype=torch.float64))

    torch.testing.assert_close(losses(Own()), losses(Blind()))


def test_the_check_of_a_margin_is_asked():
    with pytest.raises(ValueError, match=f"margin: expected {C} classes, got 5"):
        MarginSoftmaxHead(8, 5, margin=Own(), scale=16.0)


@pytest.mark.parametrize("kind", [Foreign, Own])
def test_margins_with_negatives_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"normalize: expected 'both' with {kind.__name__}"):
        MarginSoftmaxHead(8, C, margin=kind(), scale=16.0, normalize="none")
    with pytest.raises(ValueError, match=kind.__name__):
        InterClassFilter(kind())


def test_a_margin_without_m_takes_no_row_margin_and_a_foreign_one_does():
    row_margin = torch.zeros(40, dtype=torch.float64)
    with pytest.raises(ValueError, match="row_margin: expected None for NSoftmax, which has no m"):
        losses(NSoftmax(), row_margin=row_margin)
    assert all(map(torch.equal, losses(Bare(), row_margin=row_margin), losses(Bare())))
    assert losses(InterClassFilter(ArcFace(0.3)), row_margin=row_margin)[0].isfinite().all()


class Observing(torch.nn.Module):
    def forward(self):
        return 16.0

    def observe(self, lse, cosine, kept):
        raise AssertionError("never asked")


def test_a_scale_that_observes_derives_from_adaptive_scale():
    with pytest.raises(TypeError, match=r"scale: expected Observing, .* to derive from .*Adaptive"):
        MarginSoftmaxHead(8, C, margin=NSoftmax(), scale=Observing())


def test_a_call_that_fails_draws_nothing():
    margin, (x, w, y) = ElasticFace(seed=3), operands()
    state = torch.get_rng_state()
    for each in (margin, ElasticFace()):
        with pytest.raises(ValueError, match="w: expected finite rows"):
            margin_cross_entropy(x, 1e20 * w, y, margin=each, scale=16.0)
    assert margin.generators.step == 0 and torch.equal(torch.get_rng_state(), state)


def test_a_sampling_takes_the_place_of_another_where_there_is_a_generator():
    head = MarginSoftmaxHead(8, C, margin=ArcFace(), scale=16.0, sampling=PartialFC(0.5))
    head.sampling = PartialFC(0.7, logq=True)
    with pytest.raises(TypeError, match="sampling: expected PartialFC without a generator"):
        head.sampling = PartialFC(0.7, generator=torch.Generator())
    assert head.sampling == PartialFC(0.7, logq=True)
    head = MarginSoftmaxHead(8, C, margin=ArcFace(), scale=16.0)
    with pytest.raises(ValueError, match=r"sampling: expected None for a head .*rate=0.5"):
        head.sampling = PartialFC(0.5)


def test_a_margin_is_no_scale_and_a_scale_is_no_margin():
    with pytest.raises(TypeError, match=r"scale: expected a number, .* got the margin ArcFace"):
        MarginSoftmaxHead(8, C, margin=NSoftmax(), scale=ArcFace())
    with pytest.raises(TypeError, match=r"margin: expected .* got the scale AdaCos"):
        MarginSoftmaxHead(8, C, margin=AdaCos(C), scale=16.0)
