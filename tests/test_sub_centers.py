# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests heads with several centres for each class; test_losses.py compares every loss of theirs."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels import (
    ArcFace,
    CosFace,
    CurricularFace,
    MarginSoftmaxHead,
    PartialFC,
    margin_cross_entropy,
    optim,
)
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from marginkernels.sampling import ChosenBy
from tests.support import workers
from tests.support.sharding import my_rows
from tests.support.updates import skip_without_updates

F64 = torch.float64
C, D, K = 12, 6, 3


def make(backend="reference", margin=None, scale=8.0, **settings):
    settings = dict(dict(sub_centers=K, dtype=F64, bias=True), **settings)
    return MarginSoftmaxHead(
        D, C, margin=margin or ArcFace(0.3), scale=scale, backend=backend, **settings
    )


def batch(n=16, c=C, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, dtype=F64, generator=generator)
    return x, torch.randint(0, c, (n,), generator=generator)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_of_equal_centres_the_first_gets_the_gradient():
    x, y = batch()
    w = torch.randn(C, D, dtype=F64)
    twice = w.repeat_interleave(2, 0)
    results = []
    for weight, sub_centers in ((w, 1), (twice, 2)):
        weight = weight.clone().requires_grad_()
        loss = margin_cross_entropy(
            x, weight, y, margin=CurricularFace(), scale=8.0, sub_centers=sub_centers
        )
        results.append([loss, *torch.autograd.grad(loss, weight)])
    (loss, dw), (same, of_centres) = results
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(of_centres[::2], dw)
    assert (of_centres[1::2] == 0).all()


@pytest.mark.parametrize("logq", [False, True])
def test_a_sample_is_one_of_classes(logq):
    """Compares with a call on the sampled classes alone."""
    x, y = batch(c=5)
    chosen = torch.tensor([0, 1, 2, 3, 4, 7, 11])
    w, bias = torch.randn(C, K, D, dtype=F64), torch.randn(C, dtype=F64)
    positive = torch.isin(chosen, y)
    pi = (len(chosen) - positive.sum()) / (C - positive.sum())
    correction = -torch.log(pi) * ~positive if logq else 0
    results = []
    for weight, b, sampling in (
        (w, bias, ChosenBy(lambda _: chosen, logq=logq)),
        (w[chosen], bias[chosen] + correction, None),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)]
        loss, stats = margin_cross_entropy(
            leaves[0], leaves[1].flatten(0, 1), y, bias=leaves[2], sampling=sampling,
            margin=ArcFace(0.2), scale=8.0, sub_centers=K, return_stats=True,
        )  # fmt: skip
        results.append([loss, *stats, *torch.autograd.grad(loss, leaves)])
    (*sampled, dw, dbias), (*expected, of_chosen, of_bias) = results
    torch.testing.assert_close(sampled, expected)
    for all_, part in ((dw, of_chosen), (dbias, of_bias)):
        torch.testing.assert_close(all_, torch.zeros_like(all_).index_copy(0, chosen, part))


def trained(head, optimizer, steps=3, rows=slice(None)):
    """Takes steps, and returns the losses and all that the optimizer moves."""
    losses = []
    for seed in range(steps):
        x, y = batch(seed=seed, c=head.num_classes)
        optimizer.zero_grad()
        x, y = x.to(head.weight.device, head.weight.dtype), y.to(head.weight.device)
        losses.append(head(x[rows], y[rows]))
        losses[-1].backward()
        optimizer.step()
    held = [p for p in (head.weight, head.bias) if p is not None]
    states = [t for p in held for _, t in sorted(optimizer.state[p].items())]
    return [whole(torch.as_tensor(t).detach()).clone() for t in (*losses, *held, *states)]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_step_inside_backward_is_that_of_torch(kind, sampled, backend, device):
    """Without a sample; with one the centres and biases of other classes stay as they are."""
    skip_without_updates(backend)
    if kind == "AdamW" and backend != "reference":
        pytest.skip("its first steps have the sign of the gradient, which fp32 need not have")
    dtype = F64 if backend == "reference" else torch.float32
    head = make(backend, sampling=PartialFC(0.5) if sampled else None, dtype=dtype, device=device)
    settings = dict(lr=0.1) | (dict(momentum=0.9) if kind == "SGD" else {})
    before = [p.detach().clone() for p in (head.weight, head.bias)]
    other = copy.deepcopy(head)
    few = dict(steps=1, rows=slice(4)) if sampled else {}
    ours = trained(head, getattr(optim, kind)(head, **settings), **few)
    if not sampled:
        theirs = trained(other, getattr(torch.optim, kind)(other.parameters(), **settings))
        near = {} if dtype == F64 else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[:5], theirs[:5], **near)
        return
    weight, bias = ours[1:3]
    moved = (weight != before[0]).any(1).view(C, K).any(1)
    _, y = batch(seed=0)
    assert moved[y[:4]].all() and (moved | (bias == before[1])).all() and not moved.all()


def test_logits_are_those_of_classes(monkeypatch):
    monkeypatch.setattr("marginkernels.evaluation.CHUNK", 4)  # a class in each block
    head = make()
    torch.nn.init.normal_(head.bias)
    x, _ = batch()
    cosines = F.normalize(x) @ F.normalize(head.weight).T
    expected = 8.0 * cosines.view(-1, C, K).amax(2) + head.bias
    torch.testing.assert_close(head.logits(x), expected)
    torch.testing.assert_close(head.topk(x, 5), tuple(expected.topk(5)))


def test_compiles_whole(backend, device):
    head = make(
        backend, margin=CurricularFace().to(device), dtype=torch.float32, bias=False, device=device
    )
    x, y = (t.to(device) for t in batch())
    results = []
    for call in (head.eval(), torch.compile(head, fullgraph=True, backend="aot_eager")):
        head.zero_grad()
        loss = call(x.float(), y)
        loss.backward()
        results.append([loss.detach(), head.weight.grad.clone()])
    torch.testing.assert_close(*results)


def on_ranks(path):
    """Trains, adds classes, saves and evaluates; returns what has to be the same in one process."""
    alone = not dist.is_initialized()
    rows = slice(None) if alone else my_rows(16)
    head = make(sharding=None if alone else dist.group.WORLD, margin=CurricularFace(), bias=False)
    torch.manual_seed(7)
    start = torch.randn(C * K, D, dtype=F64)
    head.load_state_dict({**head.full_state_dict(), "weight": start})
    optimizer = optim.AdamW(head, lr=0.1)
    parts = trained(head, optimizer, rows=rows)
    head.extend(3, init=torch.randn(3 * K, D, dtype=F64))
    parts += trained(head, optimizer, rows=rows)
    save_checkpoint(path, head, optimizer)
    x, _ = batch()
    parts += head.topk(x, 3)
    return parts, head.full_state_dict()


def load(path):
    group = dist.group.WORLD if dist.is_initialized() else None
    head = MarginSoftmaxHead(
        D, C + 3, margin=CurricularFace(), scale=8.0, sub_centers=K, dtype=F64, sharding=group
    )
    optimizer = optim.AdamW(head, lr=0.1)
    load_checkpoint(path, head, optimizer)
    return trained(head, optimizer, steps=0), head.full_state_dict()


def test_ranks_hold_whole_classes(tmp_path):
    path, alone = str(tmp_path / "many"), str(tmp_path / "one")
    expected = on_ranks(alone)
    for got in workers.run(3, on_ranks, path):
        torch.testing.assert_close(got, expected)
    for moved in (load(path), *workers.run(3, load, alone)):
        torch.testing.assert_close(moved[1], expected[1])
    other = MarginSoftmaxHead(D, C + 3, margin=CurricularFace(), scale=8.0, sub_centers=2)
    with pytest.raises(ValueError, match=r"model: expected weight \(45, 6\) .*got \(30, 6\)"):
        load_checkpoint(path, other)


def cut_classes():
    settings = dict(margin=CosFace(), scale=8.0, sharding=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"num_classes: .*sub_centers=3 .*over 3.*as 12, got 10"):
        MarginSoftmaxHead(D, 10, sub_centers=3, **settings)
    head = MarginSoftmaxHead(D, C, sub_centers=3, **settings)
    with pytest.raises(ValueError, match=r"num_classes \+ k: .*such as 15, got 13"):
        head.extend(1)
    assert head.num_classes == C and len(head.weight) == C * 3
    MarginSoftmaxHead(D, 11, sub_centers=2, **settings)  # 8, 8 and 6 rows


def test_a_split_that_cuts_a_class_is_refused():
    workers.run(3, cut_classes)


def test_what_is_refused():
    x, y = batch()
    settings = dict(margin=ArcFace(0.3), scale=8.0)
    w = torch.randn(C * K, D, dtype=F64)
    for value, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="sub_centers: expected a positive integer, got"):
            margin_cross_entropy(x, w, y, sub_centers=value, **settings)
        with pytest.raises(error, match="sub_centers: expected a positive integer, got"):
            make(sub_centers=value)
    with pytest.raises(ValueError, match=r"w: expected 5 rows for each class .*, got 36"):
        margin_cross_entropy(x, w, y, sub_centers=5, **settings)
    with pytest.raises(ValueError, match=r"bias: expected shape \(12,\)"):
        margin_cross_entropy(x, w, y, sub_centers=K, bias=torch.zeros(36), **settings)
    with pytest.raises(ValueError, match="y: expected labels in \\[0, 12\\)"):
        margin_cross_entropy(x, w, y + 6, sub_centers=K, **settings)
    with pytest.raises(ValueError, match="save_tiles: cannot be True with sub_centers"):
        margin_cross_entropy(x, w, y, sub_centers=K, save_tiles=True, **settings)
    with pytest.raises(ValueError, match=r"init: expected shape \(6, 6\), got \(2, 6\)"):
        make().extend(2, init=torch.zeros(2, D, dtype=F64))
    with pytest.raises(AttributeError, match="sub_centers"):
        make().sub_centers = 2
