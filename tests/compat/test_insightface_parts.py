# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests what trainers import from insightface's arcface_torch beside the head."""

import io
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels.compat.insightface import (
    AllGather,
    CosFace,
    DistCrossEntropy,
    PartialFC_V2,
    PolynomialLRWarmup,
)
from tests.support import workers

C, D, F64 = 11, 6, torch.float64


def schedule(**settings):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.03}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return optimizer, PolynomialLRWarmup(optimizer, **settings)


def expected_share(step, warmup, total, power):
    """Returns the rate of a step over the rate that the optimizer begins with."""
    if step == 0:
        return 1
    if step <= warmup:
        return step / warmup
    return max(0, 1 - (step - warmup) / (total - warmup)) ** power


@pytest.mark.parametrize("warmup, total, power", [(4, 15, 2), (0, 7, 1.0), (3, 3, 1), (2.0, 9, 3)])
def test_rates_rise_linearly_and_fall_by_a_polynomial(warmup, total, power):
    optimizer, scheduler = schedule(warmup_iters=warmup, total_iters=total, power=power)
    for step in range(total + 1 if warmup < total else total):
        share = expected_share(step, warmup, total, power)
        for rate, first in zip(scheduler.get_last_lr(), (0.1, 0.03), strict=True):
            assert math.isclose(rate, first * share, rel_tol=1e-12, abs_tol=1e-15)
        optimizer.step()
        scheduler.step()
    last = scheduler.get_last_lr()
    scheduler.step()
    assert scheduler.get_last_lr() == last  # nothing changes after the end


def test_a_schedule_goes_on_from_its_state_and_jumps_to_a_step():
    settings = dict(warmup_iters=4, total_iters=15, power=2)
    optimizer, scheduler = schedule(**settings, verbose=True)
    rates = []
    for step in range(15):
        if step == 6:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    again, resumed = schedule(**settings)
    file.seek(0)
    for object, state in zip((again, resumed), torch.load(file), strict=True):
        object.load_state_dict(state)
    for rate in rates[6:]:
        again.step()
        resumed.step()
        assert resumed.get_last_lr() == rate
    with pytest.warns(UserWarning, match="epoch"):
        resumed.step(9)
    torch.testing.assert_close(resumed.get_last_lr(), rates[8])
    torch.testing.assert_close(resumed.get_last_lr()[0], again.param_groups[0]["lr"])


def test_a_schedule_refuses_wrong_numbers():
    for name, value in (("warmup_iters", -1), ("total_iters", 0), ("power", "2")):
        settings = dict(warmup_iters=2, total_iters=9) | {name: value}
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            schedule(**settings)


def logits_and_labels():
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(9, C, dtype=F64, generator=generator)
    logits[3] *= 100  # a probability below 1e-30
    return logits, torch.randint(C, (9,), generator=generator)


def cross_entropy_of_a_rank():
    logits, y = logits_and_labels()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, stop = (rank * C) // world, ((rank + 1) * C) // world
    part = logits[:, start:stop].clone().requires_grad_()
    here = (y >= start) & (y < stop)
    labels = torch.where(here, y - start, -1)[:, None]
    given = labels.clone()
    loss = DistCrossEntropy()(part, labels)
    (3 * loss).backward()
    assert torch.equal(part.detach(), logits[:, start:stop]) and torch.equal(labels, given)
    return loss.detach(), part.grad


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_cross_entropy_of_split_logits_is_that_of_all(ranks):
    logits, y = logits_and_labels()
    logits.requires_grad_()
    rows = F.cross_entropy(logits, y, reduction="none")
    assert rows.max() > 70
    (3 * rows.mean()).backward()
    results = workers.run(2, cross_entropy_of_a_rank) if ranks == 2 else [cross_entropy_of_a_rank()]
    for loss, _ in results:
        torch.testing.assert_close(loss, rows.detach().clamp_max(-math.log(1e-30)).mean())
    torch.testing.assert_close(torch.cat([part for _, part in results], 1), logits.grad)


def test_the_cross_entropy_of_no_rows_is_0_and_wrong_shapes_are_named():
    logits = torch.zeros(0, C, requires_grad=True)
    loss = DistCrossEntropy()(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    with pytest.raises(ValueError, match=r"^logit_part: expected shape \(N, C_local\), got \(3,\)"):
        DistCrossEntropy()(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^label_part: expected shape \(3, 1\), got \(2,\)"):
        DistCrossEntropy()(torch.zeros(3, C), torch.zeros(2))


def gathered():
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
    buffers = [torch.zeros(3, 2) for _ in range(world)]
    every = AllGather(x, *buffers)
    for other in range(world):
        expected = torch.arange(6.0).reshape(3, 2) + 10 * other
        assert torch.equal(every[other], expected) and torch.equal(buffers[other], expected)
    (torch.cat(every).sum() * (rank + 1)).backward()
    assert torch.equal(x.grad, torch.full((3, 2), 1.0 * world * sum(range(1, world + 1))))
    with pytest.raises(ValueError, match=f"^gather_list: expected a tensor for each of {world} "):
        AllGather(x)
    return True


@pytest.mark.parametrize("ranks", [1, 2])
def test_gathered_tensors_have_the_gradients_of_all_ranks(ranks):
    assert all(workers.run(2, gathered) if ranks == 2 else [gathered()])


@pytest.mark.parametrize("sample_rate", [0.5, 1.0])
def test_a_head_says_its_last_batch_and_sample(sample_rate):
    head = PartialFC_V2(CosFace(), D, C, sample_rate)
    assert head.last_batch_size == 0 and head.weight_index is None
    for n in (4, 3):
        y = torch.randint(C, (n,))
        head(torch.randn(n, D), y).backward()
        assert head.last_batch_size == n
        if sample_rate == 1:
            assert head.weight_index is None
            continue
        index = head.weight_index
        assert len(index) == head.num_sample and torch.isin(y, index).all()
        touched = head.weight.grad.abs().sum(1).nonzero()[:, 0]
        assert torch.equal(touched, index)
        head.weight.grad = None


def no_rows():
    head = PartialFC_V2(CosFace(), D, C, 0.5)
    x = torch.randn(0, D, requires_grad=True)
    loss = head(x, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    return loss.item(), head.weight.grad.abs().max().item(), x.grad.shape


def test_no_rows_on_any_rank_are_the_loss_0():
    assert workers.run(2, no_rows) == [(0, 0, (0, D))] * 2
