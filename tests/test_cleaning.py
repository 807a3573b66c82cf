# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests how a head with sub-centres finds wrong labels and becomes a plain head."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels import ArcFace, MarginSoftmaxHead, optim
from tests.support import workers
from tests.support.sharding import my_rows

F64 = torch.float64
C, D, K, M = 6, 24, 3, 180


def planted():
    """Returns rows around the directions of their classes, labels of which 1 in 5 is wrong."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, C, generator=generator, dtype=F64))[0].T
    true = torch.randint(0, C, (M,), generator=generator)
    x = directions[true] + 0.05 * torch.randn(M, D, generator=generator, dtype=F64)
    wrong = torch.rand(M, generator=generator) < 0.2
    shift = torch.randint(1, C, (M,), generator=generator)
    return x, torch.where(wrong, (true + shift) % C, true), wrong


def make(**settings):
    settings = dict(dict(sub_centers=K, dtype=F64), **settings)
    return MarginSoftmaxHead(D, C, margin=ArcFace(0.2), scale=16.0, **settings)


def train(head, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = head(x, y)
        loss.backward()
        optimizer.step()
    return loss.item()


def by_loops(weight, x, y, angle):
    """Returns counts and the rows that stay, class by class as public implementations do."""
    counts, keep = torch.zeros(C, K, dtype=torch.int64), torch.zeros(len(y), dtype=torch.bool)
    for label in range(C):
        rows = (y == label).nonzero()[:, 0]
        cosines = F.normalize(x[rows]) @ F.normalize(weight.view(C, K, D)[label]).T
        for nearest in cosines.argmax(1).tolist():
            counts[label, nearest] += 1
        keep[rows] = cosines[:, counts[label].argmax()] >= math.cos(angle)
    return counts, keep


def test_wrong_labels_are_found_and_the_plain_head_trains_on():
    x, y, wrong = planted()
    head = make()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    train(head, optimizer, x, y, 60)
    counts = head.center_counts(x, y)
    expected, stays = by_loops(head.weight.detach(), x, y, 1.309)
    assert torch.equal(counts, expected) and (counts.amax(1) < counts.sum(1)).any()
    before = head.weight.detach().clone().view(C, K, D)
    momentum = optimizer.state[head.weight]["momentum_buffer"].clone().view(C, K, D)
    mask = head.drop_sub_centers(optimizer=optimizer)
    assert torch.equal(mask, stays) and torch.equal(mask, ~wrong)
    dominant = counts.argmax(1)
    assert head.sub_centers == 1 and optimizer.param_groups[0]["params"] == [head.weight]
    assert torch.equal(head.weight, before[range(C), dominant])
    kept = optimizer.state[head.weight]["momentum_buffer"]
    assert torch.equal(kept, momentum[range(C), dominant])
    plain = make(sub_centers=1)
    plain.load_state_dict(head.state_dict())
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer.param_groups[0].update(lr=0.1, momentum=0)
    losses = [train(*each, x[mask], y[mask], 20) for each in ((head, optimizer), (plain, other))]
    assert losses[0] == losses[1] < 0.5 * head(x, y).item()


def clean(as_batches):
    """Counts and drops on this rank's rows, trains on, and returns all that came of it."""
    alone = not dist.is_initialized()
    x, y, _ = planted()
    y[::17] = -100
    rows = slice(None) if alone else my_rows(M)
    torch.manual_seed(3)
    start = torch.randn(C * K, D, dtype=F64)
    head = make(sharding=None if alone else dist.group.WORLD, bias=True)
    head.load_state_dict({**head.full_state_dict(), "weight": start})
    optimizer = optim.AdamW(head, lr=0.05)
    train(head, optimizer, x[rows], y[rows], 3)
    source = (x[rows], y[rows])
    if as_batches:  # ranks have different numbers of them
        source = (list(zip(x[rows].split(16), y[rows].split(16), strict=True)),)
    counts = head.center_counts(*source)
    mask = head.drop_sub_centers(angle=1.2)
    assert not mask[y[rows] == -100].any()
    loss = train(head, optimizer, x[rows], y[rows], 2)
    state = {k: getattr(t, "full_tensor", lambda t=t: t)()
             for k, t in optimizer.state[head.weight].items()}  # fmt: skip
    return mask, [counts, loss, head.full_state_dict(), state]


@pytest.mark.parametrize("as_batches", [False, True])
def test_ranks_clean_together(as_batches):
    expected_mask, expected = clean(False)
    masks, results = zip(*workers.run(3, clean, as_batches), strict=True)
    assert torch.equal(torch.cat(masks), expected_mask) and 0 < expected_mask.sum() < M
    for result in results:
        torch.testing.assert_close(result, expected)


def test_a_class_without_rows_keeps_its_first_centre():
    head = make()
    weight = head.weight.detach().clone()
    counts = head.center_counts(iter([]))
    assert torch.equal(counts, torch.zeros(C, K, dtype=torch.int64))
    assert head.drop_sub_centers().shape == (0,)
    assert torch.equal(head.weight, weight[::K])


def test_what_is_refused():
    x, y, _ = planted()
    head = make()
    for source, match in (
        ((x, None), r"labels: expected int64 \(180,\), one for each row, got NoneType"),
        ((x, y[:-1]), r"labels: .*got torch.int64 \(179,\)"),
        ((x, y + 1), r"labels: expected labels in \[0, 6\)"),
        ((x[:, 1:], y), r"embeddings: expected \(N, 24\)"),
        (([(x, y)], y), "source: expected .*got list with labels"),
        ((3,), "source: expected embeddings with labels, .*got int"),
        (([x],), r"source: expected batches \(embeddings, labels\), got Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            head.center_counts(*source)
    with pytest.raises(RuntimeError, match=r"center_counts: expected counts .*got none"):
        head.drop_sub_centers()
    head.center_counts(x, y)
    for angle in (0, -1, 3.2, math.nan):
        with pytest.raises(ValueError, match="angle: expected a number in"):
            head.drop_sub_centers(angle=angle)
    with pytest.raises(ValueError, match="keep: expected 'dominant', got 'first'"):
        head.drop_sub_centers("first")
    with pytest.raises(RuntimeError, match=r"copy|changed since"):
        copy.deepcopy(head).drop_sub_centers()
    train(head, torch.optim.SGD(head.parameters(), lr=0.1), x, y, 1)
    with pytest.raises(RuntimeError, match="got those of a weight that has changed since"):
        head.drop_sub_centers()
    plain = make(sub_centers=1)
    for call in (plain.drop_sub_centers, lambda: plain.center_counts(x, y)):
        with pytest.raises(ValueError, match="sub_centers: expected a head with several"):
            call()


def bad_rank():
    x, y, _ = planted()
    head = make(sharding=dist.group.WORLD)
    bad = dist.get_rank() == 1
    with pytest.raises(ValueError, match=r"labels: expected labels in \[0, 6\)"):
        head.center_counts(x, y + 1 if bad else y)
    head.center_counts([] if bad else [(x, y)])
    train(head, torch.optim.SGD(head.parameters(), lr=0.1), x, y, 1)
    with pytest.raises(RuntimeError, match="a weight that has changed since"):
        head.drop_sub_centers()


def test_one_bad_rank_is_every_ranks():
    workers.run(3, bad_rank)
