# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that the head's optimizers behave as optimizers of torch, and what they refuse."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from marginkernels import NSoftmax, clip_grad_norm_, clip_grad_value_
from marginkernels.optim import SGD, AdamW, RowwiseAdagrad
from tests.support import workers
from tests.support.attached import all_of, attached, take_step
from tests.support.small import batch, make_head

WRONG = {
    "lr": dict(lr=-1.0),
    "momentum": dict(momentum=-0.1),
    "nesterov": dict(nesterov=True, momentum=0.0),
    "project": dict(project=1),
    "clip_row_norm": dict(clip_row_norm=0.0),
    "state_dtype": dict(state_dtype=torch.float16),
    "scaler": dict(scaler=1.0),
    "dampening": dict(dampening="a"),
    "weight_decay": dict(weight_decay=-1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_setting_is_named_before_anything_is_attached(name):
    head = make_head("reference", "cpu")
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected"):
        SGD(head, **dict(momentum=0.9) | WRONG[name])
    assert head._update is None


def test_heads_that_cannot_be_moved_are_refused():
    with pytest.raises(ValueError, match=r"^betas: expected"):
        AdamW(make_head("reference", "cpu"), betas=(0.9,))
    with pytest.raises(TypeError, match=r"^head: expected a MarginSoftmaxHead"):
        SGD(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"float16"):
        SGD(make_head("reference", "cpu", dtype=torch.float16))
    with pytest.raises(ValueError, match=r"^state_dtype: expected"):
        SGD(make_head("reference", "cpu", dtype=torch.float64), state_dtype=torch.float32)
    head, _ = attached()
    with pytest.raises(ValueError, match=r"it has one of the rule 'sgd'. Detach"):
        RowwiseAdagrad(head)


def test_the_settings_are_live_and_schedulers_write_them():
    head, optimizer = attached()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    for step in range(5):
        take_step(head, optimizer, step)
        scheduler.step()
    group = optimizer.param_groups[0]
    assert group["lr"] > 0.5 and group["momentum"] < 0.9
    before = head.weight.detach().clone()
    group["lr"] = torch.tensor(0.0)
    take_step(head, optimizer)
    assert torch.equal(head.weight, before)
    assert "momentum: 0.8" in repr(optimizer) and repr(optimizer).startswith("SGD (")


def test_momentum_may_be_0_for_some_steps_as_in_torch():
    head, optimizer = attached(weight_decay=0.1)
    plain = copy.deepcopy(head)
    of_torch = torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.1)
    for step, momentum in enumerate((0.9, 0.0, 0.9)):
        changed = dict(momentum=momentum, dampening=0.3)
        for each in (optimizer, of_torch):
            each.param_groups[0].update(changed)
        of_torch.zero_grad()
        take_step(head, optimizer, step)
        take_step(plain, of_torch, step)
    torch.testing.assert_close(head.weight, plain.weight)


def test_a_momentum_that_comes_later_is_refused_before_anything_moves():
    head, optimizer = attached(momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = all_of(head, optimizer)
    with pytest.raises(
        ValueError, match=r"^momentum: expected 0 in an optimizer that was made without"
    ):
        take_step(head, optimizer)
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    optimizer.param_groups[0]["momentum"] = 0.0
    take_step(head, optimizer)


def test_step_wants_one_backward():
    head, optimizer = attached()
    with pytest.raises(RuntimeError, match=r"^step: expected a backward"):
        optimizer.step()
    x, y = batch("cpu")
    head(x, y).backward()
    before = all_of(head, optimizer)
    with pytest.raises(RuntimeError, match=r"expected step\(\) of the head's optimizer"):
        head(x, y).backward()
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()

    def closure():
        loss = head(x, y)
        loss.backward()
        return loss

    optimizer.zero_grad()
    assert optimizer.step(closure).ndim == 0 and seen == [1, 1]
    with torch.no_grad():
        head(x, y)  # moves nothing, and is no part of a step
    with pytest.raises(ValueError, match=r"^param_group: expected none"):
        optimizer.add_param_group({"params": [nn.Parameter(x)]})


def double_use(head, x, y):
    return head(x, y) + head(x, y)


def second_backward(head, x, y):
    loss = head(x, y)
    loss.backward(retain_graph=True)
    head._update.optimizer.step()
    return loss


def changed_between(head, x, y):
    loss = head(x, y)
    with torch.no_grad():
        head.weight.mul_(2)
    return loss


MISUSES = {
    double_use: "expected one forward of the head in a step, got 2",
    second_backward: "expected the class weights as they were in forward.*retain_graph",
    changed_between: "expected the class weights as they were in forward",
}


WEIGHTS = {
    "register_hook": lambda w: w.register_hook(lambda g: g),
    "register_post_accumulate": lambda w: w.register_post_accumulate_grad_hook(print),
    "contiguous": lambda w: setattr(w, "data", w.data.T.contiguous().T),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_backward_cannot_move_is_refused_in_forward(name):
    head, optimizer = attached()
    WEIGHTS[name](head.weight)
    with pytest.raises(RuntimeError, match=rf"^head.weight: expected .*{name}"):
        take_step(head, optimizer)
    assert not optimizer.update.torn


def test_a_state_loaded_between_forward_and_backward_is_refused():
    head, optimizer = attached(momentum=0.0)
    other, with_momentum = attached()
    take_step(other, with_momentum)
    loss = head(*batch("cpu"))
    optimizer.load_state_dict(with_momentum.state_dict())
    before = all_of(head, optimizer)
    with pytest.raises(RuntimeError, match=r"^backward: expected the optimizer's state of forward"):
        loss.backward()
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    del loss
    take_step(head, optimizer)


def test_a_weight_frozen_between_forward_and_backward_ends_its_step():
    head, optimizer = attached()
    loss = head(*batch("cpu"))
    head.weight.requires_grad_(False)
    loss.backward()
    optimizer.step()
    head.weight.requires_grad_(True)
    take_step(head, optimizer)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_the_default_device_does_not_matter(kind):
    head = make_head("reference", "cpu", margin=NSoftmax(), bias=True)
    optimizer = kind(head)
    x, y = batch("cpu")
    with torch.device("meta"):
        head(x, y).backward()
        optimizer.step()
    assert head.bias.count_nonzero() > 0


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda f: f.__name__)
def test_what_a_step_cannot_be_is_refused_before_anything_is_written(misuse):
    head, optimizer = attached()
    loss = misuse(head, *batch("cpu"))
    before = all_of(head, optimizer)
    with pytest.raises(RuntimeError, match=MISUSES[misuse]):
        loss.backward()
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    del loss
    head.zero_grad()
    take_step(head, optimizer)  # the head goes on


def test_backward_to_other_inputs_moves_nothing():
    head, optimizer = attached()
    before = all_of(head, optimizer)
    x, y = batch("cpu")
    x.requires_grad_()
    plain = copy.deepcopy(head)
    dx = torch.autograd.grad(head(x, y), x)[0]
    head(x, y).backward(inputs=[x])
    torch.testing.assert_close(dx, torch.autograd.grad(plain(x, y), x)[0])
    with pytest.raises(RuntimeError, match=r"^head.weight: expected no torch.autograd.grad"):
        torch.autograd.grad(head(x, y), head.weight)
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    loss = head(x, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"as they were in forward"):
        torch.autograd.grad(loss, x)


def test_a_second_optimizer_with_the_weight_is_refused_whichever_comes_first():
    head = make_head("reference", "cpu", scale=nn.Parameter(torch.tensor(16.0)), bias=True)
    early = torch.optim.AdamW(head.parameters())
    optimizer = SGD(head)
    late = torch.optim.SGD([head.bias], lr=0.1)
    others = torch.optim.SGD([head.scale], lr=0.1)
    x, y = batch("cpu")
    head(x, y).backward()
    before = all_of(head, optimizer)
    for other in (early, late):
        with pytest.raises(RuntimeError, match=rf"^{type(other).__name__}: expected parameters"):
            other.step()
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    others.step()
    optimizer.step()
    with pytest.raises(ValueError, match=r"^parameters: expected those with gradients.*clip_row"):
        clip_grad_norm_(head.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"clip_row_norm"):
        clip_grad_value_([head.weight], 1.0)
    optimizer.detach()
    head(x, y).backward()
    clip_grad_norm_(head.parameters(), 1.0)
    early.step()


def test_a_gradient_of_the_weight_from_elsewhere_is_not_lost_silently():
    head, optimizer = attached()
    x, y = batch("cpu")
    (head(x, y) + 0.1 * head.weight.sum()).backward()
    with pytest.raises(RuntimeError, match=r"^head.weight.grad: expected None.*weight_decay"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"^head.weight.grad: expected None"):
        head(x, y)


def test_detach_gives_the_plain_head_back():
    head, optimizer = attached()
    x, y = batch("cpu")
    pending = head(x, y)
    optimizer.detach()
    optimizer.detach()
    with pytest.raises(RuntimeError, match=r"gone or detached"):
        pending.backward()
    head(x, y).backward()
    assert head.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"^step: expected an optimizer that is attached"):
        optimizer.step()
    head.zero_grad()
    take_step(head, SGD(head))


def test_copies_and_pickles_of_the_head_are_plain_and_those_of_the_optimizer_refused():
    head, optimizer = attached()
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for plain in (copy.deepcopy(head), torch.load(file, weights_only=False)):
        plain(*batch("cpu")).backward()
        assert plain.weight.grad is not None
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^SGD: expected no copy.*load_state_dict"):
            copied(optimizer)


def wrapped(wrap):
    """Wraps a head before and after it gets an optimizer, and returns the errors of its calls."""
    x, y = batch("cpu")
    messages = []
    for early in (True, False):
        head = make_head("reference", "cpu")
        try:
            optimizer = None if early else SGD(head)
            wrapper = wrap(head)
            optimizer = optimizer or SGD(head)
            wrapper(x, y).backward()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_a_wrapper_that_waits_for_the_gradient_is_refused(wrap):
    for messages in workers.run(2, wrapped, wrap):
        assert len(messages) == 2
        assert all("Wrap the backbone alone" in message for message in messages)


def test_hooks_that_save_fewer_bits_leave_the_weights_their_own():
    head, optimizer = attached()
    plain = copy.deepcopy(head)
    x, y = batch("cpu")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.bfloat16() if t.shape == head.weight.shape else t,
        lambda t: t.float() if t.dtype == torch.bfloat16 else t,
    ):
        loss = head(x, y)
    loss.backward()
    optimizer.step()
    plain(x, y).backward()
    torch.testing.assert_close(head.weight, plain.weight - 0.1 * plain.weight.grad)


def test_hooks_on_saved_tensors_and_checkpointing_change_nothing():
    contexts = {
        "plain": lambda head, x, y: head(x, y),
        "checkpoint": lambda head, x, y: checkpoint(head, x, y, use_reentrant=False),
        "save_on_cpu": None,
    }
    results = []
    for name, loss in contexts.items():
        torch.manual_seed(0)
        head, optimizer = attached(bias=True)
        for _ in range(2):
            x, y = batch("cpu")
            x.requires_grad_()
            if name == "save_on_cpu":
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                    value = head(x, y)
            else:
                value = loss(head, x, y)
            value.backward()
            optimizer.step()
        results.append([*all_of(head, optimizer), x.grad])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
