# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests optimizers, clipping, loss scaling and averages of whole and sharded parameters."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from marginkernels import (
    CosFace,
    GradScaler,
    MarginSoftmaxHead,
    clip_grad_norm_,
    clip_grad_value_,
    param_groups,
)
from marginkernels.distributed.shard import local
from tests.support import workers

C, D = 5, 4
# settings by optimizer; torch has no fused step of DTensors for SGD
OPTIMIZERS = {
    "SGD, foreach": (torch.optim.SGD, dict(momentum=0.9, foreach=True)),
    "SGD, fused": (torch.optim.SGD, dict(momentum=0.9, fused=True)),
    "Adam, foreach": (torch.optim.Adam, dict(foreach=True)),
    "AdamW, foreach": (torch.optim.AdamW, dict(foreach=True)),
    "AdamW, fused": (torch.optim.AdamW, dict(fused=True)),
    "Adagrad, foreach": (torch.optim.Adagrad, dict(foreach=True)),
}


def make(mesh=None):
    """Makes a backbone, in FSDP2's shards on a mesh, and a head split over all processes."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(3, D)
    if mesh is not None:
        fully_shard(backbone, mesh=mesh)
    settings = dict(margin=CosFace(0.3), scale=8.0, bias=True)
    head = MarginSoftmaxHead(D, C, sharding=dist.group.WORLD, **settings)
    return torch.nn.ModuleDict({"backbone": backbone, "head": head})


def give_gradients(model, seed):
    """Gives the same gradients, however parameters are split, and returns them whole."""
    generator = torch.Generator().manual_seed(seed)
    whole = []
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator)
        whole.append(torch.nn.Parameter(torch.zeros(p.shape)))
        whole[-1].grad = gradient.clone()
        p.grad = gradient
        if isinstance(p, DTensor):
            p.grad = torch.distributed.tensor.distribute_tensor(
                gradient, p.device_mesh, p.placements, src_data_rank=None
            )
    return whole


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def step_in_groups(name):
    kind, settings = OPTIMIZERS[name]
    model = make()
    plain = copy.deepcopy(model)
    groups = param_groups(model)
    assert [isinstance(group["params"][0], DTensor) for group in groups] == [False, True]
    if name == "SGD, fused":
        groups[1]["fused"] = False
    optimizers = [
        (model, kind(groups, lr=0.1, **settings)),
        (plain, kind(plain.parameters(), lr=0.1, **settings | dict(foreach=False, fused=False))),
    ]
    for seed in range(3):
        for trained, optimizer in optimizers:
            give_gradients(trained, seed)
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(p), full(q))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_and_fused_steps_in_groups(name):
    workers.run(4, step_in_groups, name)  # the last rank has no classes


def test_groups_keep_settings_and_names():
    model = torch.nn.Linear(2, 3)
    [group] = param_groups(model)
    assert group["params"] == [*model.parameters()]
    assert param_groups(model.weight) == [{"params": [model.weight]}]
    assert param_groups(model.named_parameters()) == [{"params": [*model.named_parameters()]}]
    given = [{"params": model.weight, "lr": 0.5}, {"params": (p for p in [model.bias]), "lr": 2.0}]
    assert param_groups(given) == [
        {"params": [model.weight], "lr": 0.5},
        {"params": [model.bias], "lr": 2.0},
    ]


def clip(on_a_mesh):
    mesh = None
    if on_a_mesh:  # replicas of shards
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = make(mesh)
    for norm_type in (1.0, 2.0, torch.inf):
        whole = give_gradients(model, 1)
        norm = clip_grad_norm_((p for p in model.parameters()), 0.5, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(whole, 0.5, norm_type)
        torch.testing.assert_close(norm, expected)
        for p, q in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(full(p.grad), q.grad)
    whole = give_gradients(model, 2)
    clip_grad_value_(model.parameters(), 0.3)
    torch.nn.utils.clip_grad_value_(whole, 0.3)
    for p, q in zip(model.parameters(), whole, strict=True):
        assert torch.equal(full(p.grad), q.grad)


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_clipping(on_a_mesh):
    """Clips FSDP2's shards on a mesh of two dimensions too, beside the head's on one."""
    workers.run(4, clip, on_a_mesh)


def clip_fp16(value):
    mesh = dist.init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(DTensor.from_local(torch.zeros(4, 8).half(), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(torch.full((4, 8), value).half(), mesh, [Shard(0)])
    whole = torch.nn.Parameter(torch.zeros(8, 8))
    whole.grad = p.grad.full_tensor().float()
    norms = clip_grad_norm_(p, 4e-5), torch.nn.utils.clip_grad_norm_(whole, 4e-5)
    torch.testing.assert_close(*norms)
    assert torch.equal(p.grad.full_tensor(), whole.grad.half())


@pytest.mark.parametrize("value", [100.0, 1e-5])
def test_squares_of_gradients_may_leave_the_range_of_fp16(value):
    workers.run(2, clip_fp16, value)


def test_clipping_of_a_tensor_by_itself():
    for clip, of_torch in (
        (clip_grad_norm_, torch.nn.utils.clip_grad_norm_),
        (clip_grad_value_, torch.nn.utils.clip_grad_value_),
    ):
        p, q = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(3, 2))
        p.grad, q.grad = torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2)
        norms = clip(p, 0.5), of_torch(q, 0.5)
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.max() <= 0.5


def clip_partial():
    mesh = dist.init_device_mesh("cpu", (4,))
    p = torch.nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    for clip in (clip_grad_norm_, clip_grad_value_):
        with pytest.raises(ValueError, match=r"parameters: .* yet to be reduced"):
            clip([p], 0.5)


def test_gradients_that_are_yet_to_be_reduced_are_refused():
    workers.run(4, clip_partial)


def scale_on_a_mesh():
    """Stops all ranks by an infinity in one shard of whatever parameter."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = make(mesh)
    names = [name for name, _ in model.named_parameters()]
    for poisoned in [*names, None]:
        optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1)
        scaler.scale(torch.ones(1))
        give_gradients(model, 0)
        for name, p in model.named_parameters():
            if name == poisoned:
                p.grad = torch.full_like(p.grad, torch.inf)
                if dist.get_rank() not in (1, 3):  # the same in replicas
                    local(p.grad).zero_()
        before = [full(p.detach()).clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = [
            not torch.equal(full(p), b) for p, b in zip(model.parameters(), before, strict=True)
        ]
        assert moved == [poisoned is None] * len(moved), poisoned
        assert scaler.get_scale() == (8.0 if poisoned is None else 2.0), poisoned


def test_loss_scaling_on_two_meshes():
    workers.run(4, scale_on_a_mesh)


def average():
    model = make()
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.75), use_buffers=True)
    expected = [full(p.detach()).clone() for p in model.parameters()]
    for seed in range(3):
        give_gradients(model, seed)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        averaged.update_parameters(model)
        for e, p in zip(expected, model.parameters(), strict=True):
            e.lerp_(full(p.detach()), 0.25 if seed > 0 else 1.0)
    for ours, e in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(full(ours), e)
    x, y = torch.randn(3, 3), torch.zeros(3, dtype=torch.int64)
    whole = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, bias=True)
    whole.load_state_dict(averaged.module["head"].full_state_dict())
    features = averaged.module["backbone"](x)
    every = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(every, features.detach())
    loss = whole(torch.cat(every), y.repeat(len(every)))
    torch.testing.assert_close(averaged.module["head"](features, y), loss)


def test_averaged_weights():
    workers.run(4, average)


def prepare(port):
    from accelerate import Accelerator

    rank = str(dist.get_rank())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    accelerator = Accelerator(cpu=True)
    model = make()
    plain = copy.deepcopy(model)
    backbone, head = model["backbone"], model["head"]
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.1, fused=True)
    its_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    backbone, optimizer = accelerator.prepare(backbone, optimizer)
    of_plain = torch.nn.parallel.DistributedDataParallel(plain["backbone"])
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        x = torch.randn(4, 3, generator=generator)
        y = torch.randint(C, (4,), generator=generator)
        optimizer.zero_grad()
        accelerator.backward(head(backbone(x), y))
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        its_optimizer.zero_grad()
        plain["head"](of_plain(x), y).backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        its_optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(p), full(q))
    return type(backbone).__name__


def test_under_accelerate():
    """Prepares the backbone and the optimizer, but not the head, which DDP must not wrap."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pool = workers.Pool(2)  # it sets the environment of a launcher
    try:
        assert pool.run(prepare, "29517") == ["DistributedDataParallel"] * 2
    finally:
        pool.kill()
