# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests bad labels and samples where values are not checked, as on a GPU.

A bad label or sample gives a NaN loss, and nothing is read or written out of bounds.
"""

import warnings

import pytest
import torch
import torch.distributed as dist

from marginkernels import AdaCos, ArcFace, CurricularFace, NSoftmax, margin_cross_entropy
from marginkernels.compat.insightface import CosFace, PartialFC_V2
from marginkernels.sampling import ChosenBy
from tests.support import unchecked, workers
from tests.support.sharding import my_rows, my_shard
from tests.support.unchecked import (
    SAMPLES,
    WRONG,
    C,
    D,
    N,
    choose,
    problem,
    sampled_call,
    solve,
    values_unchecked,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", ["both", "none"])
def test_labels_out_of_range(normalize, dtype, backend, device, poisoned):
    unchecked.labels_out_of_range(normalize, dtype, backend, device)


@pytest.mark.parametrize("make", [CurricularFace, lambda: NSoftmax()], ids=["transform", "AdaCos"])
def test_labels_out_of_range_leave_no_trace_in_states(make):
    states = []
    for y in problem()[2:]:
        margin, scale = make(), AdaCos(C) if make is not CurricularFace else 8.0
        with values_unchecked():
            solve(y, *problem()[:2], margin=margin, scale=scale)
        state = margin.state_dict() | (scale.state_dict() if isinstance(scale, AdaCos) else {})
        states.append([state[name] for name in sorted(state)])
    assert states[0] and all(map(torch.equal, *states))


def sharded_labels():
    x, w, wrong, left_out = problem()
    shard, rows = my_shard(C, even_batches=True), my_rows(N, even=True)
    part = w[shard.start : shard.stop]
    results = []
    with values_unchecked():
        for y in (wrong, left_out):
            settings = dict(margin=ArcFace(0.2), scale=8.0, shard=shard)
            results.append(solve(y[rows], x[rows], part, **settings)[0])
    got, expected = results
    assert got[0][list(WRONG)].isnan().all()
    got[0], got[3] = got[0].nan_to_num(0.0), got[3].nan_to_num(0.0)
    assert all(map(torch.equal, got, expected))


def test_labels_out_of_range_of_a_sharded_head():
    workers.run(3, sharded_labels)


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_are_checked(case, backend, device, poisoned):
    unchecked.samples_are_checked(case, backend, device)


def test_a_good_sample_is_taken(backend, device):
    for logq in (False, True):
        loss = sampled_call([1, 3, 4, 7, 49], device, backend=backend, logq=logq)
        with values_unchecked():
            other = sampled_call([1, 3, 4, 7, 49], device, backend=backend, logq=logq)
        assert loss.isfinite().all() and torch.equal(loss, other)


def sharded_sample(index_of_rank):
    rank, shard, (x, w, *_) = dist.get_rank(), my_shard(C), problem()
    y = torch.tensor([3, 30])

    def call():
        return margin_cross_entropy(
            x[:2], w[shard.start : shard.stop], y, margin=ArcFace(0.2), scale=8.0, shard=shard,
            sampling=ChosenBy(choose(index_of_rank[rank])),
        )  # fmt: skip

    with values_unchecked():
        assert call().isnan()
    try:
        call()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("case", [([3, 4], [1, 2]), ([3, 4], [5, 1]), ([3, 4], [5, 99])])
def test_a_bad_sample_of_one_rank_is_an_error_of_all(case):
    first, second = workers.run(2, sharded_sample, case)
    assert second.startswith("sampling:") and first == f"rank 1: {second}"


class Chooses(PartialFC_V2):
    """Stands for a head whose choice of classes a user has overridden."""

    def sample(self, label):
        return torch.tensor(self.index)


def choosing(margin_loss, index, fused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head warns that a plain function is not fused
        head = Chooses(margin_loss if fused else margin_loss.forward, D, C, sample_rate=0.5)
    head.index = index
    return lambda: head(problem()[0][:3], torch.tensor([3, 7, 7]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", [[2, 3, 5], [7, 3], [3, 7, C]], ids=["missing", "order", "range"])
def test_the_choice_of_an_insightface_head_is_checked(index, fused):
    call = choosing(CosFace(16.0), index, fused)
    with pytest.raises(ValueError, match="sampling:"):
        call()
    with values_unchecked():
        assert call().isnan()
    assert choosing(CosFace(16.0), [1, 3, 7], fused)().isfinite()
