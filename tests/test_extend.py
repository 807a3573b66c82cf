# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Adds classes to heads and to the states of every optimizer."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import C, D, make, run, state, step, train_and_save, whole
from test_checkpoint_optimizers import OPTIMIZERS, give_gradients
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from marginkernels import ArcFace, CosFace, MarginSoftmaxHead, optim
from marginkernels.distributed.checkpoint import load_checkpoint
from tests.support import workers


def load_and_extend(kind, path, k, init, settings):
    model, optimizer = make(kind, 99, **settings)
    load_checkpoint(path, model, optimizer)
    before = state(model, optimizer)
    model["head"].extend(k, init=init, optimizer=optimizer)
    after = state(model, optimizer)
    losses = [step(model, optimizer, seed, C + k) for seed in (5, 6)]
    return before, after, losses, state(model, optimizer)


@pytest.mark.parametrize("kind, k", [("sgd", 1), ("adamw", 4)])
def test_new_classes_for_a_live_head(kind, k, tmp_path):
    path, settings = str(tmp_path / "before"), dict(margin=CosFace(0.2), bias=True)
    train_and_save(kind, path, settings)
    init = torch.randn(k, D)
    alone, sharded = (run(w, load_and_extend, kind, path, k, init, settings) for w in (1, 3))
    for before, after, *_ in (alone, sharded):
        assert after.keys() == before.keys()
        for name, old in before.items():
            if isinstance(old, torch.Tensor) and name.startswith("head") and old.ndim > 0:
                new = init if name == "head.weight" else torch.zeros(k, *old.shape[1:])
                assert torch.equal(after[name], torch.cat([old, new])), name
            else:
                torch.testing.assert_close(after[name], old, rtol=0, atol=0)
    torch.testing.assert_close(sharded[2], alone[2], rtol=1e-5, atol=0)
    for name, value in alone[3].items():
        torch.testing.assert_close(sharded[3][name], value, msg=lambda m, n=name: f"{n}: {m}")


def random_rows():
    head = make("sgd", 0)[0]["head"]
    head.extend(200)
    held = head.weight.to_local()
    assert len(held) == head.shard.size and head.num_classes == head.shard.total == C + 200
    return whole(head.weight.detach())[C:]


def test_new_classes_start_at_random_and_apart():
    rows = workers.run(3, random_rows)[0]
    assert 0.008 < rows.std() < 0.012
    assert len(rows.unique(dim=0)) == 200


def test_what_extend_refuses():
    model, optimizer = make("sgd", 0, margin=ArcFace(torch.full((C,), 0.2)))
    head, weight = model["head"], model["head"].weight
    for k, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k: expected a positive integer, got"):
            head.extend(k)
    with pytest.raises(ValueError, match=rf"init: expected shape \(2, {D}\), got \(3, {D}\)"):
        head.extend(2, init=torch.zeros(3, D))
    with pytest.raises(ValueError, match="optimizer: expected one that holds the head's weight"):
        head.extend(2, optimizer=torch.optim.SGD(model["backbone"].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=f"margin: expected a table of {C + 2} classes, got {C}"):
        head.extend(2, optimizer=optimizer)
    assert head.weight is weight and head.num_classes == C


def check_optimizer(name):
    """Steps, adds classes and steps on: states keep their values and grow by first values."""
    kind, settings = OPTIMIZERS[name]
    group = dist.group.WORLD if dist.is_initialized() else None
    torch.manual_seed(0)
    made = dict(margin=CosFace(0.3), scale=8.0, bias=name != "Muon")
    head = MarginSoftmaxHead(D, C, sharding=group, **made)
    optimizer = kind(head.parameters(), **dict(dict(lr=0.01), **copy.deepcopy(settings)))
    for seed in range(3):
        sharded_gradients(head, optimizer, seed, C)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    old = {key: whole(t.detach()).clone() for key, t in head.named_parameters()}
    parameters = dict(head.named_parameters())
    head.extend(3, optimizer=optimizer)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before.keys()
    for i, (key, p) in enumerate(head.named_parameters()):
        assert p is not parameters[key] and p is optimizer.param_groups[0]["params"][i]
        assert torch.equal(whole(p.detach())[:C], old[key])
        assert after.get(i, {}).keys() == before.get(i, {}).keys()
        for part, value in before.get(i, {}).items():
            grown = after[i][part]
            if getattr(value, "shape", ())[:1] == (C,) and part != "col_var":
                assert torch.equal(whole(grown)[:C], whole(value)), part
                fresh = whole(grown)[C:]
                start = {"step_size": 0.01, "sum": 0.0}.get(part, 0.0)
                assert fresh.shape == (3, *value.shape[1:]) and (fresh == start).all(), part
            else:
                assert whole(torch.as_tensor(grown)).equal(whole(torch.as_tensor(value))), part
    for seed in range(3, 6):
        sharded_gradients(head, optimizer, seed, C + 3)
        optimizer.step()
    moved = whole(head.weight.detach())
    assert moved.isfinite().all() and not torch.equal(moved[:C], old["weight"])


def sharded_gradients(head, optimizer, seed, num_classes):
    if head.shard is None:
        return give_gradients(head, optimizer, seed)
    for p in head.parameters():
        torch.manual_seed(seed)
        gradient = torch.randn(num_classes, *p.shape[1:])[head.shard.start : head.shard.stop]
        p.grad = torch.zeros_like(p)
        p.grad.to_local().copy_(gradient)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name):
    check_optimizer(name)


# torch's other optimizers refuse DTensors themselves
@pytest.mark.parametrize("name", ["SGD, momentum", "AdamW", "NAdam", "ASGD", "Adagrad", "Muon"])
def test_optimizers_of_shards_go_on(name):
    workers.run(3, check_optimizer, name)


def test_first_values_that_are_not_0():
    for kind, settings, key, value in (
        (torch.optim.Adagrad, dict(initial_accumulator_value=0.5), "sum", 0.5),
        (torch.optim.Rprop, dict(lr=0.25), "step_size", 0.25),
    ):
        head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0)
        optimizer = kind(head.parameters(), **settings)
        give_gradients(head, optimizer, 0)
        optimizer.step()
        head.extend(2, optimizer=optimizer)
        assert (optimizer.state[head.weight][key][C:] == value).all()


def test_one_class_with_a_factored_state():
    head = MarginSoftmaxHead(D, 1, margin=CosFace(0.3), scale=8.0)
    optimizer = torch.optim.Adafactor(head.parameters())
    for k in (1, 2):
        give_gradients(head, optimizer, k)
        optimizer.step()
        head.extend(k, optimizer=optimizer)
        assert optimizer.state[head.weight]["row_var"].shape == (head.num_classes, 1)
        assert optimizer.state[head.weight]["col_var"].shape == (1, D)


def lbfgs(head):
    return torch.optim.LBFGS(head.parameters())


def of_blocks(head):
    """Makes an optimizer with a state of blocks, as optimizers have that quantise it."""
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    optimizer.state[head.weight]["absmax"] = torch.ones(11)
    return optimizer


def parametrized(head):
    parametrizations.orthogonal(head)


def weight_norm(head):
    parametrizations.weight_norm(head)


def pruned(head):
    prune.l1_unstructured(head, "weight", 0.5)


@pytest.mark.parametrize(
    "change, match",
    [
        (lbfgs, "optimizer: expected one .*, got LBFGS"),
        (of_blocks, r"optimizer: expected state with a row for each class, got absmax \(11,\)"),
        (parametrized, "weight: expected a parameter of the head"),
        (weight_norm, "weight: expected a parameter of the head"),
        (pruned, "weight: expected a parameter of the head"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_extended_stays_as_it_is(change, match):
    head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, bias=True)
    optimizer = change(head)
    before = copy.deepcopy(head.state_dict())
    parameters = [*head.parameters()]
    with pytest.raises((ValueError, TypeError), match=match):
        head.extend(2, optimizer=optimizer)
    assert head.num_classes == C and all(
        p is q for p, q in zip(head.parameters(), parameters, strict=True)
    )
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)


def on_one_bad_rank():
    """Raises on all ranks what one of them finds wrong, and changes nothing on any."""
    head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, sharding=dist.group.WORLD)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    bad = dist.get_rank() == 1
    weight = head.weight
    with pytest.raises(ValueError, match=rf"init: expected shape \(2, {D}\), got \(3, {D}\)"):
        head.extend(2, init=torch.zeros(3 if bad else 2, D))
    with pytest.raises(TypeError, match=r"optimizer: expected one .*, got LBFGS"):
        head.extend(2, optimizer=lbfgs(head) if bad else optimizer)
    if bad:
        optimizer.state[head.weight]["momentum_buffer"] = torch.zeros_like(head.weight)
    with pytest.raises(ValueError, match=r"optimizer\.state\[weight\]: expected the same on all"):
        head.extend(2, optimizer=optimizer)
    assert head.weight is weight and head.num_classes == head.shard.total == C
    foreign = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0)
    fully_shard(foreign)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weight: expected it as the head .*fully_shard"):
            foreign.extend(2)
        foreign(torch.randn(4, D), torch.zeros(4, dtype=torch.int64))  # leaves the weight gathered


def test_one_bad_rank_and_foreign_shards():
    workers.run(3, on_one_bad_rank)


# of the head alone, which they move inside backward; with the types of features and weights
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OWN = {
    "SGD": (optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=1e-2), F32, F32),
    "AdamW, bfloat16": (optim.AdamW, dict(lr=0.05, state_dtype=BF16), F64, BF16),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, dict(lr=0.1), F64, F64),
}


def own_step(head, optimizer, seed, dtype):
    """Takes a step on all rows, the last rank's in a process group, and returns weights and all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, D, generator=generator, dtype=dtype)
    y = torch.randint(head.num_classes, (9,), generator=generator)
    if head.shard is not None and dist.get_rank() < dist.get_world_size() - 1:
        x, y = x[:0], y[:0]
    head(x, y).backward()
    optimizer.step()
    states = [optimizer.state[p] for p in head.parameters()]
    return [whole(p.detach()).clone() for p in head.parameters()] + [
        {key: whole(value).clone() for key, value in state.items()} for state in states
    ]


def grown(state, k):
    return {
        key: torch.cat([t, t.new_zeros(k, *t.shape[1:])]) if t.ndim else t
        for key, t in state.items()
    }


def extend_own(name, k, given):
    """Compares the steps after extend with those of a head that was made with all classes."""
    kind, settings, x_dtype, dtype = OWN[name]
    group = dist.group.WORLD if dist.is_initialized() else None
    made = dict(margin=CosFace(0.3), scale=8.0, bias=True, dtype=dtype)
    head = MarginSoftmaxHead(D, C, sharding=group, **made)
    optimizer = kind(head, **settings, project=True)
    for seed in range(2):
        weight, bias, *states = own_step(head, optimizer, seed, x_dtype)
    init = torch.randn(k, D, dtype=dtype)
    head.extend(k, init=init, optimizer=optimizer if given else None)
    other = MarginSoftmaxHead(D, C + k, **made)
    other.load_state_dict({"weight": torch.cat([weight, init]), "bias": grown({0: bias}, k)[0]})
    its_optimizer = kind(other, **settings)
    packed = optimizer.state_dict()
    packed["state"] = {i: grown(state, k) for i, state in enumerate(states)}
    its_optimizer.load_state_dict(packed)
    near = dict(rtol=1e-3, atol=1e-5) if dtype == F32 else {}
    for seed in range(2, 4):
        runs = (head, optimizer), (other, its_optimizer)
        ours, theirs = (own_step(*run, seed, x_dtype) for run in runs)
        torch.testing.assert_close(ours, theirs, **near)
    assert optimizer.param_groups[0]["params"] == [*head.parameters()]


@pytest.mark.parametrize("world, k, given", [(1, 2, True), (3, 1, False), (3, 4, True)])
@pytest.mark.parametrize("name", OWN)
def test_the_heads_own_optimizer_goes_on(name, world, k, given):
    """Covers states of one number per class, states in bfloat16, and norms that were known."""
    run(world, extend_own, name, k, given)


def test_extend_between_the_backward_and_the_step_is_refused():
    head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0)
    optimizer = optim.SGD(head, lr=0.1)
    x, y = torch.randn(4, D), torch.arange(4)
    before = head(x, y)
    head.extend(1)
    with pytest.raises(RuntimeError, match="class weights as they were in forward"):
        before.backward()
    with optimizer.accumulate():
        head(x, y).backward()
    with pytest.raises(RuntimeError, match=r"expected no step under way.*Call step\(\) first"):
        head.extend(1)
    head(x, y).backward()
    with pytest.raises(RuntimeError, match=r"expected no step under way.*Call step\(\) first"):
        head.extend(1)
    optimizer.step()
    with pytest.raises(ValueError, match="optimizer: expected None or the head's own, SGD of"):
        head.extend(1, optimizer=torch.optim.Adam(torch.nn.Linear(2, 2).parameters()))
    head.extend(1)
    assert head.num_classes == C + 2
