# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the drop-ins for CVLface's classifiers with its formulas on the dense logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels.compat.cvlface import FC, AdaFaceLoss, CombinedMarginLoss, PartialFC_V2
from tests.support import workers

C, D, F64 = 11, 6, torch.float64
M, H, T_ALPHA = 0.4, 0.333, 0.3
LOSSES = {
    "adaface": (lambda: AdaFaceLoss(64, m=M, h=H, t_alpha=T_ALPHA), 2.0),
    "adaface, filtered": (lambda: AdaFaceLoss(64, M, H, T_ALPHA, 0.2), 0.2),
    "cosface": (lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.35), 2.0),
}


def batch(n, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    x = 12 * torch.rand(n, 1, generator=generator) * torch.randn(n, D, generator=generator)
    return x.to(F64).requires_grad_(), torch.randint(C, (n,), generator=generator)


class Dense:
    """Has CVLface's formulas and statistics."""

    def __init__(self, name):
        self.name, self.threshold = name, LOSSES[name][1]
        self.mean, self.std = torch.full((1,), 20.0, dtype=F64), torch.full((1,), 100.0, dtype=F64)

    def __call__(self, x, w, y):
        norm = x.norm(dim=1)
        cosine = (x / norm[:, None]) @ F.normalize(w).T
        c = cosine.gather(1, y[:, None])[:, 0]
        others = cosine.masked_fill(cosine > self.threshold, 0)
        target = c - 0.35
        if self.name != "cosface":
            norm = norm.detach().clip(0.001, 100)
            self.mean = T_ALPHA * norm.mean() + (1 - T_ALPHA) * self.mean
            self.std = T_ALPHA * norm.std() + (1 - T_ALPHA) * self.std
            q = (H * (norm - self.mean) / (self.std + 1e-3)).clip(-1, 1)
            value = torch.cos(torch.acos(c.detach()) - M * q) - (M + M * q)
            target = value + (c - c.detach())
        return F.cross_entropy(64 * others.scatter(1, y[:, None], target[:, None]), y)


def compare(head, dense, x, y):
    for _ in range(3):
        loss, expected = head(x, y), dense(x, head.weight, y)
        leaves = [x, head.weight]
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        )
        if dense.name != "cosface":
            statistics = head.batch_mean, head.batch_std
            torch.testing.assert_close(statistics, (dense.mean, dense.std))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classifier", ["fc", "partial_fc"])
def test_one_rank_has_the_loss_gradients_and_statistics(name, classifier):
    loss = LOSSES[name][0]()
    head = FC(loss, D, C) if classifier == "fc" else PartialFC_V2(0, 1, loss, D, C)
    names = ["weight"] if name == "cosface" else ["weight", "batch_mean", "batch_std"]
    assert list(head.state_dict()) == names
    compare(head.double(), Dense(name), *batch(9))


def rank_steps(name, sizes, sample_rate):
    rank = dist.get_rank()
    head = PartialFC_V2(rank, 2, LOSSES[name][0](), D, C, sample_rate).double()
    x, y = batch(sizes[rank], seed=rank)
    for _ in range(2):
        x.grad = head.weight.grad = None
        loss = head(x, y)
        loss.backward()
    index = head.weight_index if sample_rate < 1 else torch.arange(head.num_local)
    classes = head.class_start + index
    return head.state_dict(), loss.detach(), x.grad, head.weight.grad, classes, head.num_classes


@pytest.mark.parametrize("name, sample_rate", [*((n, 1.0) for n in LOSSES), ("adaface", 0.5)])
def test_two_ranks_have_as_many_classes_and_the_statistics_of_all_rows(name, sample_rate):
    sizes = (5, 8)
    ranks = workers.run(2, rank_steps, name, sizes, sample_rate)
    states, losses, dx, dw, classes, padded = zip(*ranks, strict=True)
    assert padded == (12, 12)  # 11 classes and one more
    x = torch.cat([batch(n, r)[0].detach() for r, n in enumerate(sizes)]).requires_grad_()
    y = torch.cat([batch(n, r)[1] for r, n in enumerate(sizes)])
    w = torch.cat([state["weight"] for state in states]).requires_grad_()
    sampled = torch.cat(classes)
    dense, place = Dense(name), torch.searchsorted(sampled, y)
    dense(x, w[sampled], place)
    loss = dense(x, w[sampled], place)
    loss.backward()
    for got, state in zip(losses, states, strict=True):
        torch.testing.assert_close(got, loss.detach())
        if name != "cosface":
            assert state["batch_mean"].shape == state["batch_std"].shape == (1,)
            torch.testing.assert_close(state["batch_mean"], dense.mean)
            torch.testing.assert_close(state["batch_std"], dense.std)
    torch.testing.assert_close(torch.cat(dw), w.grad)
    torch.testing.assert_close(torch.cat(dx), 2 * x.grad)


@pytest.mark.parametrize("name", ["adaface", "adaface, filtered"])
def test_checkpoints_inside_a_classifier_go_both_ways(name):
    def classifier():
        module = torch.nn.Module()
        module.partial_fc = PartialFC_V2(0, 1, LOSSES[name][0](), D, C)
        return module

    values = torch.randn(C, D), torch.tensor([7.0]), torch.tensor([3.0])
    names = ("partial_fc.weight", "partial_fc.batch_mean", "partial_fc.batch_std")
    theirs = dict(zip(names, values, strict=True))
    module = classifier()
    assert not any(module.load_state_dict(theirs))
    assert module.partial_fc.batch_mean == 7 and module.partial_fc.batch_std == 3
    state = module.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], value) for name, value in theirs.items())
    with pytest.raises(RuntimeError, match="batch_mean"):
        classifier().load_state_dict({"partial_fc.weight": theirs["partial_fc.weight"]})


def test_ddp_averages_the_fc_of_all_ranks():
    for w, dw in workers.run(2, ddp_step):
        w.requires_grad_()
        losses = [Dense("cosface")(x, w, y) for x, y in (batch(4, 0), batch(4, 1))]
        torch.testing.assert_close(dw, *torch.autograd.grad(sum(losses) / 2, w))


def ddp_step():
    head = FC(LOSSES["cosface"][0](), D, C).double()
    ddp = torch.nn.parallel.DistributedDataParallel(head)
    ddp(*batch(4, seed=dist.get_rank())).backward()
    return head.weight.detach(), head.weight.grad


def test_numbers_can_change_and_wrong_ones_are_named():
    loss = LOSSES["adaface, filtered"][0]()
    loss.m = 0.2
    assert loss.m == loss.margin.margin.m == 0.2 and (loss.h, loss.t_alpha) == (H, T_ALPHA)
    with pytest.raises(ValueError, match=r"^rank, world_size: expected .* \(0, 1\), got \(1, 2\)"):
        PartialFC_V2(1, 2, loss, D, C)
    with pytest.raises(TypeError, match=r"^margin_loss: expected a MarginLoss .* got function"):
        FC(batch, D, C)
    with pytest.raises(ValueError, match=r"^s: expected a finite number > 0, got -1"):
        AdaFaceLoss(-1, M, H, T_ALPHA)
    assert not hasattr(FC(LOSSES["cosface"][0](), D, C), "batch_mean")
