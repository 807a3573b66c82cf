# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Moves class weights inside backward where ranks split the classes, or a step samples them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from marginkernels import CosFace, CurricularFace, MarginSoftmaxHead, Sharding
from marginkernels.optim import SGD, AdamW, RowwiseAdagrad
from tests.support import workers
from tests.support.sharding import my_rows

F64, BF16 = torch.float64, torch.bfloat16
N, C, D = 12, 7, 6
OPTIMIZERS = {
    "SGD": (SGD, torch.optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=True)),
    "AdamW": (AdamW, torch.optim.AdamW, dict(lr=0.05, weight_decay=0.1)),
    "RowwiseAdagrad": (RowwiseAdagrad, None, dict(lr=0.1, weight_decay=1e-2)),
}


def make(classes=C, sharding=None, **settings):
    settings = dict(margin=CosFace(0.2), scale=8.0, dtype=F64, backend="reference") | settings
    return MarginSoftmaxHead(D, classes, sharding=sharding, **settings)


def batches(steps, classes=C, dtype=F64):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(N, D, generator=generator, dtype=dtype)
        yield x, torch.randint(classes, (N,), generator=generator)


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def parameters(head):
    return {name: p for name in ("weight", "bias") if (p := getattr(head, name)) is not None}


def found(head, optimizer):
    """Returns the weights, the bias and their states, of all classes."""
    parts = {}
    for name, p in parameters(head).items():
        parts[name] = whole(p)
        parts |= {f"{name} {key}": whole(value) for key, value in optimizer.state[p].items()}
    return parts


def step_beside_others(name, classes, settings, sharding):
    """Compares each step with those of an unsharded head and of torch's optimizer."""
    fused, of_torch, rule = OPTIMIZERS[name]
    head = make(classes, Sharding(dist.group.WORLD, **sharding), **copy.deepcopy(settings))
    others = make(classes, **copy.deepcopy(settings)), copy.deepcopy(head)
    others[0].load_state_dict(head.full_state_dict())
    runs = [(model, fused(model, **rule)) for model in (head, others[0])]
    if of_torch is not None:
        runs.append((others[1], of_torch(parameters(others[1]).values(), **rule)))
    factor = dist.get_world_size() if sharding.get("grad_scale", "ddp") == "ddp" else 1
    rows = my_rows(N)
    for x, y in batches(3, classes):
        dx = []
        for model, optimizer in runs:
            is_split = model.shard is not None
            own = x[rows] if is_split else x
            own = own.clone().requires_grad_()
            model(own, y[rows] if is_split else y).backward()
            optimizer.step()
            optimizer.zero_grad()
            dx.append(own.grad if is_split else factor * own.grad[rows])
        assert head.weight.grad is None
        states = [found(*run) for run in runs]
        for its_dx, state in zip(dx[1:], states[1:], strict=True):
            torch.testing.assert_close(its_dx, dx[0])
            torch.testing.assert_close(state, {key: states[0][key] for key in state})
    for p in parameters(head).values():
        for key, value in runs[0][1].state[p].items():
            assert key == "step" or value.placements == (Shard(0),)


@pytest.mark.parametrize("grad_scale", ["ddp", "exact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_each_rank_is_that_of_one_process_and_of_torch(name, grad_scale):
    """Covers rows that differ from rank to rank, and ranks without rows or without classes."""
    sharding = dict(grad_scale=grad_scale)
    workers.run(3, step_beside_others, name, C, dict(bias=True), sharding)
    workers.run(3, step_beside_others, name, 4, dict(margin=CurricularFace()), sharding)
