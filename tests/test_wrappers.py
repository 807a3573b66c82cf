# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests heads that other modules wrap or shard, or should."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from marginkernels import CosFace, MarginSoftmaxHead
from tests.support import workers

N, C, D = 6, 11, 8


class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, D)
        self.head = MarginSoftmaxHead(D, C, margin=CosFace(0.2), scale=8.0, **settings)

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def batch():
    return torch.randn(N, D), torch.randint(0, C, (N,))


def parts_of_a_sharded_weight(whole):
    """Calls a head that fully_shard has split.

    Inside the forward of the module that fully_shard was given, the whole weight is there. Outside
    of it the head raises an error.
    """
    torch.manual_seed(1)
    model, plain, (x, y) = Model(bias=True), Model(bias=True), batch()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model if whole else model.head, mesh=mesh)
    loss = model(x, y)
    torch.testing.assert_close(loss, plain(x, y))
    loss.backward()
    sharded = model if whole else model.head
    sharded.reshard()
    head, expected = model.head, plain.head.topk(x, 3)
    messages = []
    for call in (lambda: head.topk(x, 3), lambda: head.logits(x), lambda: head.forward(x, y)):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
    sharded.unshard()
    assert all(map(torch.equal, head.topk(x, 3), expected))
    sharded.reshard()
    return messages


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "the head"])
def test_a_part_of_a_head_is_not_taken_for_all_of_it(whole):
    for messages in workers.run(2, parts_of_a_sharded_weight, whole):
        assert len(messages) == 3
        for message in messages:
            assert all(word in message for word in ("weight:", "DTensor", "unshard()"))


def told(make, steps=2, call=None):
    """Returns the warnings of an evaluation and some training steps of the module made."""
    model, (x, y) = make(), batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            model(x, y)
        for _ in range(steps):
            (call or model)(x, y).backward()
    return [str(w.message) for w in caught if "MarginSoftmaxHead" in str(w.message)]


class TwoWrapped(nn.Module):
    """Wraps backbone and head in a DistributedDataParallel each."""

    def __init__(self):
        super().__init__()
        model = Model()
        self.backbone, self.head = map(DistributedDataParallel, (model.backbone, model.head))

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def fully_sharded():
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def from_meta():
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    for module in model.children():
        module.reset_parameters()
    return model


def extended():
    model = Model()
    model.head.extend(2)
    return model


def warnings_of_set_ups():
    frozen = Model()
    frozen.head.requires_grad_(False)
    return {
        "alone": told(Model),
        "copied": told(lambda: copy.deepcopy(Model())),
        "from meta": told(from_meta),
        "extended": told(extended),
        "DDP": told(lambda: DistributedDataParallel(Model())),
        "DDP of each": told(TwoWrapped),
        "FSDP": told(lambda: FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))),
        "FSDP, original parameters": told(
            lambda: FullyShardedDataParallel(
                Model(), device_id=torch.device("cpu"), use_orig_params=True
            )
        ),
        "fully_shard": told(fully_sharded),
        "split": told(lambda: Model(sharding=dist.group.WORLD)),
        "frozen": told(lambda: frozen),
    }


def trained_with_a_table(original_parameters):
    """Trains a head with a learnable table of margins, and calls it once without gradient."""
    head = MarginSoftmaxHead(D, C, margin=CosFace(nn.Parameter(torch.full((C,), 0.2))), scale=8.0)
    model = FullyShardedDataParallel(
        head, device_id=torch.device("cpu"), use_orig_params=original_parameters
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(N, D), torch.arange(N)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
        with torch.no_grad():
            model(x, y)
    with FullyShardedDataParallel.summon_full_params(model):
        return head.margin.m.detach().clone(), sorted(name for name, _ in head.named_buffers())


@pytest.mark.parametrize("original_parameters", [False, True])
def test_a_table_of_margins_is_trained_by_fully_sharded_data_parallel(original_parameters):
    (first, buffers), (second, _) = workers.run(2, trained_with_a_table, original_parameters)
    assert torch.equal(first, second) and buffers == []
    assert (first[:N] != 0.2).all() and torch.equal(first[N:], torch.full((C - N,), 0.2))


def test_heads_that_would_drift_apart_are_warned_of_once():
    for told_of in workers.run(2, warnings_of_set_ups):
        for drifting in ("alone", "copied", "from meta", "extended"):
            (warned,) = told_of.pop(drifting)
            words = ("2 processes", "sharding", "filterwarnings")
            assert all(word in warned for word in words)
        assert not any(told_of.values()), told_of
    assert not workers.run(1, told, Model)[0]
