# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that no norm of the class weights is out of date, and what state the optimizers load."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import marginkernels.optim
from marginkernels import ArcFace, MarginSoftmaxHead
from marginkernels.optim import RowwiseAdagrad
from tests.support.attached import all_of, attached, take_step
from tests.support.small import C, D, batch, make_head
from tests.support.updates import skip_without_updates


def data_swapped_back(head):
    """Assigns memory to .data twice, so that the second may have the address of the first."""
    head.weight.data = torch.randn(C, D)
    head.weight.data = torch.randn(C, D)


def with_data(write):
    def change(head):
        write(head.weight.data)

    return change


def without_grad(write):
    @torch.no_grad()
    def change(head):
        write(head.weight)

    return change


def swapped(head):
    """Shrinks the storage and fills it again, as FullyShardedDataParallel does."""
    values = torch.randn(C, D)
    storage = head.weight.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(head.weight):
        head.weight.copy_(values)


CHANGES = {
    "load_state_dict": lambda head: head.load_state_dict(
        make_head("reference", "cpu").state_dict()
    ),
    "load_state_dict(assign)": lambda head: head.load_state_dict(
        {"weight": torch.randn(C, D)}, assign=True
    ),
    "copy_": without_grad(lambda w: w.copy_(torch.randn(C, D))),
    "a row": without_grad(lambda w: w[3].mul_(2)),
    "set_": without_grad(lambda w: w.set_(torch.randn(C, D))),
    "init": lambda head: nn.init.normal_(head.weight),
    "reset_parameters": lambda head: head.reset_parameters(),
    "data =": lambda head: setattr(head.weight, "data", torch.randn(C, D)),
    "data = twice": data_swapped_back,
    "data in place": with_data(lambda w: w.mul_(torch.rand(C, 1))),
    "numpy": lambda head: head.weight.detach().numpy().__imul__(3),
    "vector_to_parameters": lambda head: nn.utils.vector_to_parameters(
        torch.randn(C * D), [head.weight]
    ),
    "to(bfloat16)": lambda head: head.to(torch.bfloat16),
    "to(float64)": lambda head: head.to(torch.float64),
    "FSDP": swapped,
    "extend": lambda head: head.extend(5, optimizer=head._update.optimizer),
    "a new parameter": lambda head: setattr(head, "weight", nn.Parameter(torch.randn(C, D))),
}


# with the remedy, a new optimizer
REFUSED = ("to(float64)", "a new parameter", "load_state_dict(assign)")


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight_has_its_own_norms(name, backend, device):
    """Compares the next loss with that of a plain copy, unless there is an error with a remedy."""
    skip_without_updates(backend)
    head, optimizer = attached(backend)
    take_step(head, optimizer)
    assert optimizer.update.known_norms(head.weight, torch.float32) is not None
    CHANGES[name](head)
    plain = copy.deepcopy(head)
    x, y = batch("cpu")
    try:
        loss = head(x, y)
    except (RuntimeError, ValueError) as error:
        assert name in REFUSED, error
        return
    assert name not in REFUSED
    assert optimizer.update.known_norms(head.weight, torch.float32) is None
    torch.testing.assert_close(loss, plain(x, y), rtol=1e-5, atol=0)
    loss.backward()
    optimizer.step()


def test_norms_hold_until_the_weight_changes():
    head, optimizer = attached()
    take_step(head, optimizer)
    with torch.inference_mode():
        known = optimizer.update.known_norms(head.weight, torch.float32)
        head(*batch("cpu"))
    torch.testing.assert_close(known, 1 / head.weight.detach().norm(dim=1))
    assert optimizer.update.known_norms(head.weight, torch.bfloat16) is None


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_state_of_torch_loads_and_a_strange_one_changes_nothing(kind):
    ours, theirs = (
        getattr(marginkernels.optim, kind),
        getattr(torch.optim, kind),
    )
    more = dict(momentum=0.9, dampening=0.5) if kind == "SGD" else dict(betas=(0.8, 0.9))
    plain = make_head("reference", "cpu", bias=True)
    old = theirs([plain.weight, plain.bias], lr=0.1, **more)

    def plain_step(seed):
        torch.manual_seed(seed)
        x, y = batch("cpu")
        plain(x, y).backward()
        old.step()
        old.zero_grad()

    plain_step(0)
    head = copy.deepcopy(plain)
    optimizer = ours(head, lr=1.0, **{k: v for k, v in more.items() if k == "momentum"})
    seed = optimizer.param_groups[0]["seed"]
    optimizer.load_state_dict(old.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["seed"] == seed
    plain_step(1)
    take_step(head, optimizer, 1)
    torch.testing.assert_close(head.weight, plain.weight)
    torch.testing.assert_close(head.bias, plain.bias)

    before = all_of(head, optimizer)
    fresh = ours(make_head("reference", "cpu"), **more)
    adagrad = RowwiseAdagrad(make_head("reference", "cpu", bias=True))
    larger = ours(MarginSoftmaxHead(D, C + 1, margin=ArcFace(), scale=8.0, bias=True), **more)
    maximizing = theirs([plain.weight, plain.bias], lr=0.1, maximize=True)
    other = torch.optim.RMSprop([plain.weight, plain.bias])  # without a state as yet
    settings = dict(optimizer.param_groups[0])
    for strange in (fresh, adagrad, larger, maximizing, other):
        with pytest.raises(ValueError, match=r"^state_dict: expected"):
            optimizer.load_state_dict(strange.state_dict())
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    assert optimizer.param_groups[0] == settings


@pytest.mark.parametrize("average", [{}, dict(avg_fn=get_ema_avg_fn(0.5)),
                                     dict(multi_avg_fn=get_ema_multi_avg_fn(0.5))],
                         ids=["mean", "ema", "ema of many"])  # fmt: skip
def test_averaged_weights_follow_what_backward_moves(average):
    """Expects a plain head as average, which takes a backward without moving anything."""
    head, expected = make_head("reference", "cpu", bias=True), []
    averaged = AveragedModel(head, **average)
    optimizer = marginkernels.optim.SGD(head, lr=0.5, momentum=0.9)
    later = AveragedModel(head, **average)  # of a head that has its optimizer
    for seed in range(2):
        take_step(head, optimizer, seed)
        expected.append(head.weight.detach().clone())
        for each in (averaged, later):
            each.update_parameters(head)
    for each in (averaged, later):
        torch.testing.assert_close(each.module.weight.detach(), sum(expected) / 2)
        each(*batch("cpu")).backward()
        assert each.module._update is None and each.module.weight.grad is not None
    assert not torch.equal(*expected) and torch.equal(head.weight, expected[1])
