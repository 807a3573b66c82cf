# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Where values are not checked, as on a GPU, bad labels and samples give a NaN loss, and nothing is
read or written out of bounds.
"""

import contextlib
import unittest.mock
import warnings

import pytest
import torch
import torch.distributed as dist

from marginkernels import AdaCos, ArcFace, CurricularFace, NSoftmax, margin_cross_entropy
from marginkernels.compat.insightface import CosFace, PartialFC_V2
from tests.support import workers
from tests.support.sharding import my_rows, my_shard

N, C, D = 9, 50, 12
WRONG = {2: C, 3: -5, 5: 2**40}  # labels, by row; row 6 is ignored


@contextlib.contextmanager
def unchecked():
    with unittest.mock.patch("marginkernels.validation.checks_values", lambda _: False):
        yield


def solve(y, x, w, leaves=(), **settings):
    """Losses of the rows, statistics, and gradients of the losses of the rows that are right."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    losses, stats = margin_cross_entropy(x, w, y, reduction="none", return_stats=True, **settings)
    right = torch.ones(len(losses), dtype=torch.bool, device=losses.device)
    right[list(WRONG)] = False
    gradients = torch.autograd.grad(losses[right].sum(), [x, w, *leaves])
    return [losses.detach(), *stats, *gradients], right


def problem(device="cpu"):
    torch.manual_seed(0)
    x, w = torch.randn(N, D, device=device), torch.randn(C, D, device=device)
    y = torch.randint(0, C, (N,), device=device)
    y[6] = -100
    wrong, left_out = y.clone(), y.clone()
    for row, label in WRONG.items():
        wrong[row], left_out[row] = label, -100
    return x, w, wrong, left_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", ["both", "none"])
def test_labels_out_of_range(normalize, dtype, backend, device, poisoned):
    """Their rows are NaN; all else is as if they were ignored."""
    x, w, wrong, left_out = problem(device)
    x, w = x.to(dtype), w.to(dtype)
    table = torch.nn.Parameter(torch.rand(C, device=device))
    scale = torch.tensor(4.0, device=device, requires_grad=True)
    settings = dict(margin=ArcFace(table), scale=scale, normalize=normalize, backend=backend)
    leaves = (table, scale)
    with unchecked():
        got, right = solve(wrong, x, w, leaves, **settings)
        expected, _ = solve(left_out, x, w, leaves, **settings)
        mean = margin_cross_entropy(x, w, wrong, **settings)
    assert mean.isnan() and got[0][~right].isnan().all() and got[3][~right].isnan().all()
    assert not got[2][~right].any() and not got[1][~right].any()
    got[0], got[3] = (t.nan_to_num(0.0) for t in (got[0], got[3]))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [CurricularFace, lambda: NSoftmax()], ids=["transform", "AdaCos"])
def test_labels_out_of_range_leave_no_trace_in_states(make):
    states = []
    for y in problem()[2:]:
        margin, scale = make(), AdaCos(C) if make is not CurricularFace else 8.0
        with unchecked():
            solve(y, *problem()[:2], margin=margin, scale=scale)
        state = margin.state_dict() | (scale.state_dict() if isinstance(scale, AdaCos) else {})
        states.append([state[name] for name in sorted(state)])
    assert states[0] and all(map(torch.equal, *states))


def sharded_labels():
    x, w, wrong, left_out = problem()
    shard, rows = my_shard(C, even_batches=True), my_rows(N, even=True)
    part = w[shard.start : shard.stop]
    results = []
    with unchecked():
        for y in (wrong, left_out):
            settings = dict(margin=ArcFace(0.2), scale=8.0, shard=shard)
            results.append(solve(y[rows], x[rows], part, **settings)[0])
    got, expected = results
    assert got[0][list(WRONG)].isnan().all()
    got[0], got[3] = got[0].nan_to_num(0.0), got[3].nan_to_num(0.0)
    assert all(map(torch.equal, got, expected))


def test_labels_out_of_range_of_a_sharded_head():
    workers.run(3, sharded_labels)


def choose(index):
    return lambda label: torch.as_tensor(index, device=label.device)


SAMPLES = {  # what a sampler returns for rows of the classes 3, 7, 7; words of the error
    "a class is missing": ([2, 3, 5, 9], ["sampler:", "class 7"]),
    "unsorted": ([7, 3, 5], ["sampler:", "sorted", "got 3"]),
    "repeated": ([3, 7, 7], ["sampler:", "without repetition", "got 7"]),
    "too large": ([3, 7, C], ["sampler:", f"[0, {C})", f"got {C}"]),
    "negative": ([-1, 3, 7], ["sampler:", f"[0, {C})", "got -1"]),
    "floats": ([3.0, 7.0], ["sampler:", "int64", "float32"]),
    "empty": (torch.empty(0, dtype=torch.int64), ["sampler:", f"1 to {C}", "(0,)"]),
    "2-d": ([[3, 7]], ["sampler:", "(1, 2)"]),
}


def sampled_call(index, device="cpu", **settings):
    x, w, *_ = problem(device)
    y = torch.tensor([3, 7, 7], device=device)
    settings = dict(margin=ArcFace(0.2), scale=8.0, reduction="none") | settings
    return margin_cross_entropy(x[:3], w, y, sampler=choose(index), **settings)


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_are_checked(case, backend, device, poisoned):
    """Their type and shape everywhere, their values on the CPU."""
    index, words = SAMPLES[case]
    typed = case in ("floats", "empty", "2-d")
    if typed or device == "cpu":
        with pytest.raises((TypeError, ValueError)) as refusal:
            sampled_call(index, device, backend=backend)
        assert all(word in str(refusal.value) for word in words), refusal.value
    if not typed:
        with unchecked():
            loss = sampled_call(index, device, backend=backend)
        assert loss.isnan().tolist() == [case != "a class is missing", True, True]


def test_a_good_sample_is_taken(backend, device):
    for logq in (False, True):
        loss = sampled_call([1, 3, 4, 7, 49], device, backend=backend, logq=logq)
        with unchecked():
            other = sampled_call([1, 3, 4, 7, 49], device, backend=backend, logq=logq)
        assert loss.isfinite().all() and torch.equal(loss, other)


def sharded_sample(index_of_rank):
    rank, shard, (x, w, *_) = dist.get_rank(), my_shard(C), problem()
    y = torch.tensor([3, 30])

    def call():
        return margin_cross_entropy(
            x[:2], w[shard.start : shard.stop], y, margin=ArcFace(0.2), scale=8.0, shard=shard,
            sampler=choose(index_of_rank[rank]),
        )  # fmt: skip

    with unchecked():
        assert call().isnan()
    try:
        call()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("case", [([3, 4], [1, 2]), ([3, 4], [5, 1]), ([3, 4], [5, 99])])
def test_a_bad_sample_of_one_rank_is_an_error_of_all(case):
    first, second = workers.run(2, sharded_sample, case)
    assert second.startswith("sampler:") and first == f"rank 1: {second}"


class Chooses(PartialFC_V2):
    """A head of which a user has overridden the choice of classes."""

    def sample(self, label):
        return torch.tensor(self.index)


def choosing(margin_loss, index, fused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not fused
        head = Chooses(margin_loss if fused else margin_loss.forward, D, C, sample_rate=0.5)
    head.index = index
    return lambda: head(problem()[0][:3], torch.tensor([3, 7, 7]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", [[2, 3, 5], [7, 3], [3, 7, C]], ids=["missing", "order", "range"])
def test_the_choice_of_an_insightface_head_is_checked(index, fused):
    call = choosing(CosFace(16.0), index, fused)
    with pytest.raises(ValueError, match="sampler:"):
        call()
    with unchecked():
        assert call().isnan()
    assert choosing(CosFace(16.0), [1, 3, 7], fused)().isfinite()
