# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the Partial FC of 2022 with one whose optimizer moves rows of whole matrices."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels.compat.insightface import CombinedMarginLoss
from marginkernels.compat.insightface_older import PartialFC, PartialFCAdamW
from tests.support import workers

C, D, F64 = 11, 6, torch.float64
LR, DECAY = 0.05, 1e-2
HEADS = {
    "SGD": (PartialFC, lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=DECAY)),
    "AdamW": (PartialFCAdamW, lambda p: torch.optim.AdamW(p, LR, weight_decay=DECAY)),
}


def make(name, sample_rate=0.5):
    kind, optimizer = HEADS[name]
    head = kind(CombinedMarginLoss(16, 1.0, 0.0, 0.35), D, C, sample_rate).double()
    backbone = torch.nn.Linear(D, D).double()
    groups = [{"params": backbone.parameters()}, {"params": head.parameters()}]
    return head, optimizer(groups)


def batch(n, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, D, dtype=F64, generator=generator)
    return x.requires_grad_(), torch.randint(C, (n,), generator=generator)


def loss_of(x, w, y):
    cosine = F.normalize(x) @ F.normalize(w).T
    return F.cross_entropy(16 * (cosine - 0.35 * F.one_hot(y, len(w)).to(F64)), y)


class Dense:
    """Moves the rows of a sample by the formulas, with states of all classes."""

    def __init__(self, name, w):
        self.name, self.w, self.t = name, w.clone(), 0
        self.first, self.second = torch.zeros_like(w), torch.zeros_like(w)

    def __call__(self, x, y, index):
        w = self.w[index].requires_grad_()
        loss = loss_of(x, w, torch.searchsorted(index, y))
        dx, g = torch.autograd.grad(loss, [x, w])
        w = w.detach()
        if self.name == "SGD":
            self.first[index] = 0.9 * self.first[index] + g + DECAY * w
            self.w[index] = w - LR * self.first[index]
            return loss, dx
        self.t += 1
        self.first[index] = 0.9 * self.first[index] + 0.1 * g
        self.second[index] = 0.999 * self.second[index] + 0.001 * g**2
        t = self.t + 1  # as in insightface one ahead
        root = (self.second[index] / (1 - 0.999**t)).sqrt() + 1e-8
        step = self.first[index] / (1 - 0.9**t) / root
        self.w[index] = w * (1 - LR * DECAY) - LR * step
        return loss, dx


@pytest.mark.parametrize("sample_rate", [0.5, 0.0])
@pytest.mark.parametrize("name", HEADS)
def test_a_step_moves_the_sample_and_its_states_alone(name, sample_rate):
    head, optimizer = make(name, sample_rate)
    assert list(head.state_dict()) == ["weight"] and len(list(head.parameters())) == 1
    dense = Dense(name, head.weight)
    for seed in range(6):
        x, y = batch(4, seed)
        loss = head(x, y, optimizer)
        loss.backward()
        expected, dx = dense(x, y, head.weight_index)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(x.grad, dx)
        assert len(head.weight_index) == max(head.num_sample, len(y.unique()))
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(head.state_dict()["weight"], dense.w)  # after the step


def rank_steps(name):
    rank = dist.get_rank()
    head, optimizer = make(name)
    steps, first = [], head.weight.clone()
    for seed in range(4):
        x, y = batch((3, 5)[rank], 10 * rank + seed)
        loss = head(x, y, optimizer)
        loss.backward()
        steps.append((loss.detach(), x.grad, head.class_start + head.weight_index))
        optimizer.step()
        optimizer.zero_grad()
    return first, steps, head.state_dict()["weight"]


@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_move_what_one_would(name):
    (first, steps, last), (others, more, end) = workers.run(2, rank_steps, name)
    dense = Dense(name, torch.cat([first, others]))
    for seed, ((loss, dx, a), (same, dx2, b)) in enumerate(zip(steps, more, strict=True)):
        x, y = (torch.cat(parts) for parts in zip(batch(3, seed), batch(5, 10 + seed), strict=True))
        expected, grad = dense(x, y, torch.cat([a, b]))
        torch.testing.assert_close((loss, same), (expected.detach(),) * 2)
        torch.testing.assert_close(torch.cat([dx, dx2]), 2 * grad)
    torch.testing.assert_close(torch.cat([last, end]), dense.w)


@pytest.mark.parametrize("name", HEADS)
def test_all_classes_train_as_in_torch_and_checkpoints_change_the_rate(name):
    head, optimizer = make(name, 1.0)
    w = head.weight.detach().clone().requires_grad_()
    theirs = HEADS[name][1]([w])
    for seed in range(3):
        x, y = batch(4, seed)
        for loss, o in ((head(x, y, optimizer), optimizer), (loss_of(x, w, y), theirs)):
            o.zero_grad()
            loss.backward()
            o.step()
    torch.testing.assert_close(head.weight, w)
    assert list(head.state_dict()) == ["weight"]
    sampled, o = make(name)
    x, y = batch(4, 0)
    sampled(x, y, o).backward()
    o.step()
    sampled.load_state_dict(head.state_dict())
    assert torch.equal(sampled.weight, head.weight)
    assert all((getattr(sampled, buffer) == 0).all() for buffer in sampled.states.values())
    loss = sampled(x, y, o)
    index = sampled.weight_index
    expected = loss_of(x, head.weight[index], torch.searchsorted(index, y))
    torch.testing.assert_close(loss, expected)
    sampled.reset_parameters()
    assert not torch.equal(sampled.weight, head.weight) and sampled.weight.isfinite().all()
    make(name, 1.0)[0].load_state_dict(sampled.state_dict())


def test_wrong_optimizers_are_named():
    (head, optimizer), (x, y) = make("SGD"), batch(4, 0)
    for wrong, error, text in (
        (make("AdamW")[1], TypeError, r"optimizer: expected torch.optim.SGD, got AdamW"),
        (None, TypeError, r"optimizer: expected torch.optim.SGD, got NoneType"),
        (make("SGD")[1], ValueError, r"optimizer: expected the parameter of this PartialFC in it"),
    ):
        with pytest.raises(error, match=f"^{text}"):
            head(x, y, wrong)
    with pytest.raises(ValueError, match=r"^local_labels: expected labels in"):
        head(x, y + C, optimizer)
    assert math.isfinite(head(x, y, optimizer).item())


def test_amsgrad_is_refused_where_the_head_keeps_the_states_of_a_sample():
    x, y = batch(4, 0)
    for sample_rate in (0.5, 1.0):
        head = make("AdamW", sample_rate)[0]
        optimizer = torch.optim.AdamW(head.parameters(), LR, amsgrad=True)
        if sample_rate == 1:
            head(x, y, optimizer).backward()
            optimizer.step()
        else:
            with pytest.raises(ValueError, match=r"^optimizer: expected amsgrad=False for Partial"):
                head(x, y, optimizer)
