# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the greatest cosines of rows, and the losses that read them, at ties and when off."""

import math

import pytest
import torch
import torch.nn.functional as F

from marginkernels import (
    ArcFace,
    CosFace,
    InterTopK,
    MarginSchedule,
    NSoftmax,
    greatest,
    margin_cross_entropy,
)
from marginkernels.sampling import ChosenBy
from tests.support.losses import LOSSES, C, dense, operands, solve

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("width", [1, 5, 64, 639, 640, 641, 1000, 4096])
@pytest.mark.parametrize("k", [1, 5])
def test_the_greatest_are_those_of_topk(width, k, device):
    values = torch.randn(7, width, device=device)
    values[0] = 0.5  # all equal
    values[1, width // 2 :] = -math.inf
    best, columns = greatest.greatest(values, k)
    assert torch.equal(best, values.topk(min(k, width), dim=1).values)
    assert torch.equal(values.gather(1, columns), best)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


@pytest.mark.parametrize("compute_dtype", [F32, BF16, F64])
@pytest.mark.parametrize(
    "sub_centers, labels, indexed", [(1, 0, False), (1, 3, True), (3, 0, True), (3, 2, False)]
)
def test_greatest_cosines_of_classes_that_are_no_target(
    sub_centers, labels, indexed, compute_dtype, device, monkeypatch
):
    monkeypatch.setattr(greatest, "CHUNK", 32)
    n, c, d, k = 9, 50, 12, 6
    x = torch.randn(n, d, dtype=F64, device=device).to(compute_dtype)
    w = torch.randn(c * sub_centers, d, dtype=F64, device=device).to(compute_dtype)
    index, classes = None, torch.arange(c, device=device)
    if indexed:
        classes = torch.randperm(c, device=device)[:40].sort().values
        index = (
            classes[:, None] * sub_centers + torch.arange(sub_centers, device=device)
        ).flatten()
    y = torch.randint(-1, len(classes), (n, labels) if labels else (n,), device=device)
    cosines = F.normalize(x.double()) @ F.normalize(w.double()).T
    cosines = cosines.unflatten(1, (c, sub_centers)).amax(2)[:, classes]
    for i in range(n):
        cosines[i, [j for j in y[i].flatten().tolist() if j >= 0]] = -math.inf
    expected = cosines.topk(k, dim=1).values
    places = torch.where(y >= 0, y * sub_centers + sub_centers - 1, -1)
    found = greatest.greatest_cosines(x, w, index, places, k, sub_centers, compute_dtype)
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-12 if compute_dtype == F64 else 1e-6
    )
    few = greatest.greatest_cosines(x, w[: 3 * sub_centers], None, places, k, sub_centers, BF16)
    assert few[:, 3:].isneginf().all()


def check_penalised(cosines, top_k, expected, backend, device):
    """Checks which of the classes with these cosines get a penalty, by the loss."""
    c = torch.tensor([0.3, *cosines], dtype=F64)
    w = torch.stack([c, (1 - c**2).sqrt()], 1).to(device, F32)
    x, y = torch.tensor([[1.0, 0.0]], device=device), torch.tensor([0], device=device)
    margin = InterTopK(NSoftmax(), top_k=top_k, penalty=0.2)
    loss = margin_cross_entropy(x, w, y, margin=margin, scale=8.0, backend=backend)
    nearer = torch.tensor([False, *expected])
    logits = 8.0 * torch.where(nearer, torch.cos(torch.acos(c) - 0.2), c)
    exact = F.cross_entropy(logits[None], torch.tensor([0]))
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=0)


def test_all_that_tie_with_the_last_get_the_penalty(backend, device):
    cosines = [0.5, 0.8, 0.1, 0.8, 0.6, 0.8]
    least = {1: 0.8, 2: 0.8, 3: 0.8, 4: 0.6, 5: 0.5, 6: 0.1, 9: 0.1}
    for top_k, last in least.items():
        check_penalised(cosines, top_k, [c >= last for c in cosines], backend, device)
    # what is 4e-7 below the last ties with it, what is 4e-6 below does not
    check_penalised([0.8, 0.8 - 4e-7, 0.5], 1, [True, True, False], backend, device)
    check_penalised([0.8, 0.8 - 4e-6, 0.5], 1, [True, False, False], backend, device)


@pytest.mark.parametrize("off", [dict(penalty=0.0), dict(top_k=0)], ids=str)
def test_switched_off_it_is_the_margin_inside_and_makes_no_sweep(off, monkeypatch):
    monkeypatch.setattr("marginkernels.sweep.greatest_cosines", None)
    x, w, y = operands()
    margin = InterTopK(ArcFace(0.2))
    with pytest.raises(TypeError):  # on, it makes one
        margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    for name, value in off.items():
        setattr(margin, name, value)
    ours = margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    assert torch.equal(ours, margin_cross_entropy(x, w, y, margin=ArcFace(0.2), scale=16.0))


def test_a_sample_has_its_own_hardest(backend, device):
    x, w, y = operands(dtype=F32)
    chosen = torch.arange(C)[(torch.arange(C) % 3 != 1) | torch.isin(torch.arange(C), y)]
    places = torch.searchsorted(chosen, y)
    loss = LOSSES["inter-top-k"]
    exact = solve(lambda x, w: dense(loss, x, w[chosen], places), x.double(), w.double())
    settings = dict(margin=loss.make(), scale=loss.scale, reduction="none", backend=backend)
    sampling = ChosenBy(lambda _: chosen.to(device))
    ours = solve(
        lambda x, w: margin_cross_entropy(x, w, y.to(device), sampling=sampling, **settings),
        x.to(device), w.to(device),
    )  # fmt: skip
    for value, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-4, atol=1e-5)


def test_no_label_of_a_row_is_among_its_hardest(backend, device):
    x, w, y = operands(dtype=F32)
    y = torch.stack([y, (y + 7) % C], 1)
    cosines = F.normalize(x.double()) @ F.normalize(w.double()).T
    own = torch.zeros_like(cosines).scatter(1, y, 1.0) > 0
    nearest = cosines.masked_fill(own, -2).topk(5, dim=1).indices
    closer = torch.cos(torch.acos(cosines.gather(1, nearest)) - 0.1)
    others = cosines.scatter(1, nearest, closer).masked_fill(own, -math.inf)
    lse = (16 * others).logsumexp(1, keepdim=True)
    exact = F.softplus(lse - 16 * (cosines.gather(1, y) - 0.2)).mean(1)
    given = [t.to(device) for t in (x, w, y)]
    margin = InterTopK(CosFace(0.2), penalty=0.1)
    settings = dict(margin=margin, scale=16.0, reduction="none", backend=backend)
    ours = margin_cross_entropy(*given, **settings)
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_a_schedule_drives_margin_and_penalty_as_wespeaker_does():
    margin = InterTopK(ArcFace(0.0), penalty=0.09)  # mp = 0.06 for m = 0.2 is 0.09 for 0.3
    schedule = MarginSchedule(margin, initial=0.0, final=0.3, start=10, finish=60)
    assert margin.margin.m == 0 and margin.penalty == 0 and margin.hardest == 0
    for step in range(1, 80):
        schedule.step()
        ratio = min(max(step - 10, 0) / 50, 1)
        m = 0.3 if step >= 60 else 0.3 * (1 - math.exp(ratio * math.log(1e-3 / (1 + 1e-6))))
        assert margin.margin.m == pytest.approx(m, abs=1e-6)
        assert margin.penalty == pytest.approx(0.06 * m / 0.2, abs=1e-6)
    resumed = InterTopK(ArcFace(0.0), penalty=0.09)
    again = MarginSchedule(resumed, initial=0.0, final=0.3, start=10, finish=60)
    again.load_state_dict(schedule.state_dict())
    assert resumed.penalty == margin.penalty and resumed.margin.m == margin.margin.m
    with pytest.raises(ValueError, match=r"initial: expected 0 <= initial <= final.*InterTopK"):
        MarginSchedule(InterTopK(CosFace(-0.1)), initial=-0.1, final=0.3, finish=10)


def test_refusals():
    with pytest.raises(ValueError, match=r"margin: .*leaves the negatives alone, got InterTopK"):
        InterTopK(InterTopK(ArcFace()))
    margin = InterTopK(ArcFace())
    with pytest.raises(ValueError, match=r"penalty: expected a number in \[0, 1\], got 2"):
        margin.penalty = 2
    with pytest.raises(TypeError, match=r"top_k: expected an integer"):
        margin.top_k = 2.5
    assert margin.penalty == 0.06 and margin.top_k == 5
