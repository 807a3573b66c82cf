# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares a Partial FC step on a sample of the classes with a step of a smaller head."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels import (
    AdaCos,
    ArcFace,
    CurricularFace,
    ElasticFace,
    MarginSoftmaxHead,
    MVSoftmax,
    PartialFC,
    margin_cross_entropy,
)
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from marginkernels.sampling import ChosenBy, sample_classes, sampled
from tests.support import workers
from tests.support.sharding import my_rows, my_shard

F64 = torch.float64
D, C = 6, 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=10, c=C):
    return torch.randn(n, D, dtype=F64), torch.randn(c, D, dtype=F64), torch.randint(0, c, (n,))


def test_positives_are_kept_and_negatives_uniform():
    label = torch.tensor([7, -1, 3, 7, 39])
    drawn, draws = torch.zeros(C), 1500
    for seed in range(draws):
        index = sample_classes(label, C, 13, generator(seed))
        assert index.shape == (13,) and (index.diff() > 0).all()
        drawn[index] += 1
    assert (drawn[[3, 7, 39]] == draws).all()
    others = drawn[torch.tensor([j not in (3, 7, 39) for j in range(C)])]
    p = (13 - 3) / (C - 3)
    assert ((others - draws * p).abs() < 4.5 * math.sqrt(draws * p * (1 - p))).all()


def test_sizes_depend_on_shapes_and_nothing_waits():
    """Runs on the meta device, where the read of a value, for which the host waits, is an error."""
    bias = torch.empty(100, device="meta")
    label = torch.empty(64, dtype=torch.int64, device="meta")
    index = sample_classes(label, 100, 70)
    parts = sampled(100, bias, label, index, True, torch.float32)
    assert [tuple(t.shape) for t in parts] == [(70,), (64,)]


def dense(x, w, y, parts, logq):
    """Computes ArcFace(0.2) on the classes that each (start, stop) of ``parts`` contributes."""
    index = torch.cat([start + sample for start, _, sample in parts])
    cosine = F.normalize(x) @ F.normalize(w)[index].T
    place = torch.searchsorted(index, y)
    target = torch.cos(torch.acos(cosine.gather(1, place[:, None])) + 0.2)
    logits = 16 * cosine.scatter(1, place[:, None], target)
    if logq:
        corrections = []
        for start, stop, sample in parts:
            own = torch.isin(start + sample, y)
            pi = (len(sample) - own.sum()) / (stop - start - own.sum())
            corrections.append(-torch.log(pi) * ~own)
        logits = logits + torch.cat(corrections)
    return F.cross_entropy(logits, place)


def solve(loss, x, w):
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    value = loss(*leaves)
    return [value, *torch.autograd.grad(value, leaves)]


SETTINGS = dict(margin=ArcFace(0.2, branch="none"), scale=16.0)


@pytest.mark.parametrize("logq", [False, True])
def test_a_sampled_loss_is_that_of_the_sample(logq):
    """Compares the gradient of all of w too, which is 0 in rows outside the sample."""
    x, w, y = problem()
    settings = dict(SETTINGS, sampling=PartialFC(0.4, logq, generator()))
    got = solve(lambda x, w: margin_cross_entropy(x, w, y, **settings), x, w)
    index = sample_classes(y, C, 16, generator())
    torch.testing.assert_close(got, solve(lambda x, w: dense(x, w, y, [(0, C, index)], logq), x, w))
    left_out = torch.ones(C, dtype=torch.bool)
    left_out[index] = False
    assert left_out.sum() == 24 and not got[2][left_out].any()


def sharded_sample(logq):
    rank, world = dist.get_rank(), dist.get_world_size()
    (x, w, y), shard = problem(), my_shard(C)
    rows, classes = my_rows(len(x)), slice(shard.start, shard.stop)
    settings = dict(SETTINGS, sampling=PartialFC(0.4, logq, generator(rank)), shard=shard)
    got = solve(lambda x, w: margin_cross_entropy(x, w, y[rows], **settings), x[rows], w[classes])
    parts = []
    for other in range(world):
        size = -(-C // world)
        start, stop = other * size, min((other + 1) * size, C)
        label = torch.where((y >= start) & (y < stop), y - start, -1)
        num_sample = max(int(0.4 * (stop - start)), len(y))
        parts.append(
            (start, stop, sample_classes(label, stop - start, num_sample, generator(other)))
        )
    loss, dx, dw = solve(lambda x, w: dense(x, w, y, parts, logq), x, w)
    torch.testing.assert_close(got, [loss, dx[rows], dw[classes]])


@pytest.mark.parametrize("logq", [False, True])
def test_each_rank_samples_its_classes(logq):
    workers.run(3, sharded_sample, logq)


def test_logq_makes_the_sum_over_the_sample_that_over_all_on_average():
    x, w, y = problem(n=4)
    settings = dict(margin=ArcFace(0.0), scale=2.0, reduction="none")

    def over_others(**more):  # the sum of exp over the other classes over exp of the target's
        return margin_cross_entropy(x, w, y, **settings, **more).expm1()

    draws = [over_others(sampling=PartialFC(0.25, True, generator(seed))) for seed in range(600)]
    draws = torch.stack(draws)
    error = (draws.mean(0) - over_others()) / (draws.std(0) / len(draws) ** 0.5)
    assert (error.abs() < 4).all()


def make_head(**settings):
    settings = dict(margin=ArcFace(0.2), scale=16.0, sampling=PartialFC(0.5)) | settings
    return MarginSoftmaxHead(D, C, **settings)


@pytest.mark.parametrize("margin", [CurricularFace, MVSoftmax])
def test_margins_of_a_sample_see_the_cosines_of_the_rows_own_classes(margin):
    x, w, y = problem()
    index = sample_classes(y, C, C // 2, generator())
    loss = margin_cross_entropy(
        x, w, y, margin=margin(0.4), scale=16.0, sampling=PartialFC(0.5, generator=generator())
    )
    place = torch.searchsorted(index, y)
    alone = margin_cross_entropy(x, w[index], place, margin=margin(0.4), scale=16.0)
    assert torch.allclose(loss, alone, rtol=1e-12)


def test_the_state_of_the_sample_is_saved_and_evaluation_uses_all_classes():
    head, (x, _, y) = make_head(), problem()
    x = x.float()
    first, second = head(x, y), head(x, y)
    assert first != second
    twin = make_head()
    twin.load_state_dict(head.state_dict())
    assert "sampler._extra_state" in head.state_dict()
    assert all(head(x, y) == twin(x, y) for _ in range(3))
    head.eval()
    whole = make_head(sampling=PartialFC(1.0))
    whole.weight = head.weight
    assert head(x, y) == head(x, y) == whole(x, y)
    assert set(whole.state_dict()) == {"weight"}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("what", ["sampled", "seeded"])
def test_states_load_where_nothing_is_drawn_and_from_there(what, checkpoint, tmp_path):
    """Loads a state without random numbers, which then go on from the head's own seed."""

    def make(draws):
        torch.manual_seed(5)
        if what == "sampled":
            head = make_head(sampling=PartialFC(0.5 if draws else 1.0))
        else:
            head = make_head(margin=ElasticFace(seed=3 if draws else None), sampling=None)
        return torch.nn.ModuleList([head])

    x, _, y = problem()
    for draws in (False, True):
        source, target, fresh = make(draws), make(not draws), make(not draws)
        source[0](x.float(), y)
        with torch.no_grad():
            source[0].weight.add_(1)
        if checkpoint:
            save_checkpoint(tmp_path / str(draws), source)
            load_checkpoint(tmp_path / str(draws), target)
        else:
            target.load_state_dict(source.state_dict())
        assert torch.equal(source[0].weight, target[0].weight)
        (key,) = source.state_dict().keys() ^ target.state_dict().keys()
        if not draws:
            assert torch.equal(target.state_dict()[key], fresh.state_dict()[key])
    wrong = source.state_dict() | {"0.other._extra_state": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="other"):
        target.load_state_dict(wrong)


def samples():
    torch.manual_seed(0)  # the same on all ranks, as careless trainers do
    head = make_head(sharding=dist.group.WORLD)
    index = [
        sample_classes(torch.tensor([-1]), 20, 10, head.sampler("cpu", dist.get_rank()))
        for _ in range(2)
    ]
    return index, head.sampler.get_extra_state()


def test_ranks_and_steps_draw_differently():
    (first, state), (second, other_state) = workers.run(2, samples)
    drawn = [tuple(index.tolist()) for index in (*first, *second)]
    assert len(set(drawn)) == 4 and torch.equal(state, other_state) and state[1] == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(rate=0.0), ["rate:", "(0, 1]", "0.0"]),
        (dict(rate=1.5), ["rate:", "1.5"]),
        (dict(rate="x"), ["rate:", "'x'"]),
        (dict(logq="x"), ["logq:", "bool", "'x'"]),
        (dict(generator=3), ["generator:", "Generator", "int"]),
        (dict(generator=generator()), ["sampling:", "without a generator"]),
        (dict(head=dict(label_smoothing=0.1)), ["label_smoothing:", "0.1"]),
        (dict(logq=True, head=dict(margin=CurricularFace())), ["logq:", "CurricularFace"]),
        (dict(logq=True, head=dict(scale=AdaCos(C))), ["logq:", "AdaCos"]),
        (dict(head=dict(sampling=0.5)), ["sampling:", "PartialFC", "float"]),
        (dict(head=dict(sampling=ChosenBy(torch.unique))), ["sampling:", "PartialFC"]),
    ],
)
def test_refusals(settings, words):
    with pytest.raises((TypeError, ValueError)) as refusal:
        more = settings.pop("head", {})
        make_head(**dict(dict(sampling=PartialFC(**dict(dict(rate=0.5), **settings))), **more))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_sample_is_chosen_by_a_function():
    with pytest.raises(TypeError, match="function: expected a function of labels, got int"):
        ChosenBy(3)
