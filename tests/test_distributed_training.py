# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with classes split over processes: DDP, optimizers, meshes, and misuse."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from marginkernels import (
    ArcFace,
    CurricularFace,
    ElasticFace,
    GradScaler,
    MagFace,
    MarginSoftmaxHead,
    PartialFC,
    Sharding,
    clip_grad_norm_,
    margin_cross_entropy,
)
from marginkernels.distributed.shard import local
from tests.support import workers
from tests.support.sharding import my_rows

C, D = 13, 8
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
}


def make_head(**settings):
    return MarginSoftmaxHead(D, C, **dict(dict(margin=ArcFace(0.2), scale=8.0), **settings))


def sharded_head(grad_scale="ddp", **settings):
    """Makes a head over all processes, and one with the same weights in each process."""
    head = make_head(sharding=Sharding(dist.group.WORLD, grad_scale), **settings)
    whole = make_head(**copy.deepcopy(settings))
    whole.load_state_dict(head.full_state_dict())
    return head, whole


def make_backbone():
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, D))


def batches(steps, n=16):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        y = torch.randint(0, C, (n,), generator=generator)
        yield torch.randn(n, 6, generator=generator) + y[:, None] / 4, y


def train(optimizer, settings, steps=20):
    """Trains a DDP backbone with a sharded head beside one process with all rows and classes."""
    head, whole = sharded_head(**settings)
    backbone = make_backbone()
    alone = copy.deepcopy(backbone)
    ddp = DistributedDataParallel(backbone)
    optimizers = [
        OPTIMIZERS[optimizer]([*body.parameters(), *top.parameters()])
        for body, top in ((ddp, head), (alone, whole))
    ]
    for x, y in batches(steps):
        rows = my_rows(len(x))
        losses = [head(ddp(x[rows]), y[rows]), whole(alone(x), y)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for loss, step in zip(losses, optimizers, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    for ours, theirs in (
        (backbone.state_dict(), alone.state_dict()),
        (head.full_state_dict(), whole.state_dict()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    return loss.item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world", [2, 3])
def test_twenty_steps_equal_those_of_one_process(world, optimizer):
    """Covers a backbone under DDP, a last rank without rows, and a scale and bias that learn."""
    scale = torch.nn.Parameter(torch.tensor(8.0))
    workers.run(world, train, optimizer, dict(scale=scale, bias=True))
    workers.run(world, train, optimizer, dict(margin=CurricularFace(0.2, alpha=0.1)))


def gradient_of_features(grad_scale):
    """Covers ArcFace, and MagFace, whose gradient also flows through the rows' norms."""
    factor = dist.get_world_size() if grad_scale == "ddp" else 1
    for margin in (ArcFace(0.2), MagFace(1.5, 4.0)):
        head, whole = sharded_head(margin=margin, grad_scale=grad_scale)
        torch.manual_seed(0)
        x, y, rows = torch.randn(6, D), torch.randint(0, C, (6,)), my_rows(6)
        own = x[rows].requires_grad_()
        head(own, y[rows]).backward()
        whole(x.requires_grad_(), y).backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), whole.weight.grad)
        torch.testing.assert_close(own.grad, factor * x.grad[rows])


@pytest.mark.parametrize("grad_scale", ["ddp", "exact"])
def test_gradient_contract(grad_scale):
    workers.run(3, gradient_of_features, grad_scale)


def clip_and_scale():
    head, whole = sharded_head(bias=True)
    backbone = make_backbone()
    alone, ddp = copy.deepcopy(backbone), DistributedDataParallel(backbone)
    models = [(ddp, head), (alone, whole)]
    x, y = next(batches(1))
    rows = my_rows(len(x))
    parts = [(x[rows], y[rows]), (x, y)]
    norms = []
    for norm_type in (2.0, 3.0, torch.inf):
        norms.append([])
        for (body, top), (x, y), clip in zip(
            models, parts, (clip_grad_norm_, torch.nn.utils.clip_grad_norm_), strict=True
        ):
            parameters = [*body.parameters(), *top.parameters()]
            for p in parameters:
                p.grad = None
            (100 * top(body(x), y)).backward()
            norms[-1].append(clip(parameters, 0.5, norm_type))
        torch.testing.assert_close(*norms[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            head.weight.grad.full_tensor(), whole.weight.grad, rtol=1e-4, atol=1e-6
        )
    # with an infinity in one shard, or in the backbone, no rank steps, and all lower their scale
    parameters = [*ddp.parameters(), *head.parameters()]
    for poisoned in (head.weight, parameters[0], None):
        optimizer = OPTIMIZERS["SGD"](parameters)
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1)
        before = [full(p).detach().clone() for p in parameters]
        optimizer.zero_grad()
        scaler.scale(head(ddp(parts[0][0]), parts[0][1])).backward()
        if poisoned is parameters[0] or (poisoned is head.weight and dist.get_rank() == 0):
            local(poisoned.grad)[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(full(p), b) for p, b in zip(parameters, before, strict=True)]
        assert not any(moved) if poisoned is not None else all(moved)
        assert scaler.get_scale() == (8.0 if poisoned is None else 2.0)


def scale_plain_shards():
    """Scales gradients of plain parameters that each rank has of its own, as compat's are."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler = GradScaler("cpu", init_scale=4.0, process_group=dist.group.WORLD)
    scaler.scale(p.sum() * (torch.inf if dist.get_rank() == 1 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (p == 1).all() and scaler.get_scale() == 2.0


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def test_clipping_and_loss_scaling():
    """Steps whole and sharded parameters in one optimizer, with 13 classes on 3 ranks and on 5."""
    for world in (3, 5):
        workers.run(world, clip_and_scale)
    workers.run(3, scale_plain_shards)


class Temperature(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self):
        return self.log.exp()


def frozen(frozen_rank):
    """Lets one rank train neither backbone nor head: its features need no gradient."""
    rank, gradients = dist.get_rank(), []
    for scale in (torch.nn.Parameter(torch.tensor(8.0)), Temperature()):
        for promise in ({}, {"even_batches": True}):
            head = make_head(sharding=Sharding(dist.group.WORLD, **promise), scale=scale)
            head.requires_grad_(rank != frozen_rank)
            x = torch.randn(4, D).requires_grad_(rank != frozen_rank)
            head(x, torch.randint(0, C, (4,))).backward()
            assert (x.grad is None) == (rank == frozen_rank)
        gradients += [p.grad for name, p in head.named_parameters() if name != "weight"]
    return gradients


def test_a_frozen_rank_hangs_nobody():
    first, second, third = workers.run(3, frozen, 1)
    assert second == [None, None] and first == third and all(g != 0 for g in first)


def on_a_mesh():
    """Trains two replicas of a head that is split in two; replicas average their gradients."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    with pytest.raises(ValueError, match=r"sharding: expected a device mesh of one dimension"):
        make_head(sharding=mesh)
    head, data = make_head(sharding=mesh["classes"]), mesh.get_group("data")
    assert head.shard.total == C and head.weight.device_mesh.ndim == 1
    dist.broadcast(head.weight.to_local().detach(), group=data, group_src=0)
    whole = make_head()
    whole.load_state_dict(head.full_state_dict())
    backbone = make_backbone()
    alone, ddp = copy.deepcopy(backbone), DistributedDataParallel(backbone)
    x, y = next(batches(1))
    rows = my_rows(len(x), even=True)
    head(ddp(x[rows]), y[rows]).backward()
    dist.all_reduce(head.weight.grad.to_local(), group=data)
    whole(alone(x), y).backward()
    torch.testing.assert_close(head.weight.grad.full_tensor() / 2, whole.weight.grad)
    for ours, theirs in zip(backbone.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_one_dimension_of_a_mesh():
    workers.run(4, on_a_mesh)


class Model(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(D, D), head

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


def inside_ddp():
    model = Model(make_head(sharding=dist.group.WORLD, bias=True))
    before = model.head.full_state_dict()
    for wrapped in (model, model.head):
        with pytest.raises(ValueError, match=r"head\.weight|weight, bias.*Wrap the backbone alone"):
            DistributedDataParallel(wrapped)
    # the remedy that the message names
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, ["head.weight", "head.bias"]
    )
    DistributedDataParallel(model)(torch.randn(3, D), torch.zeros(3, dtype=torch.int64)).backward()
    torch.testing.assert_close(model.head.full_state_dict(), before)
    DistributedDataParallel(Model(make_head()))


def test_ddp_refuses_a_model_with_a_sharded_head():
    workers.run(2, inside_ddp)


class Recorded(ElasticFace):
    """Keeps the numbers that this rank has drawn."""

    def draw(self, x, rank=0):
        self.drawn = super().draw(x, rank)
        return self.drawn


def draws_of_two_runs():
    """Draws this rank's next margins, in a run and in another that goes on from its state."""
    head, resumed = (make_head(sharding=dist.group.WORLD, margin=Recorded(seed=s)) for s in (5, 9))
    x, y = torch.randn(4, D), torch.randint(0, C, (4,))
    head(x, y)
    state = [head.full_state_dict()]  # the first rank's state, as in a checkpoint
    dist.broadcast_object_list(state)
    resumed.load_state_dict(state[0])
    for each in (head, resumed):
        each(x, y)
    return [each.margin.drawn for each in (head, resumed)]


def test_random_margins_go_on_from_one_state_and_differ_between_ranks():
    first, second = workers.run(2, draws_of_two_runs)
    assert torch.equal(*first) and torch.equal(*second)
    assert not torch.equal(first[0], second[0])


def step_without(victim):
    head = make_head(sharding=dist.group.WORLD)
    dist.barrier()
    if dist.get_rank() == victim:
        time.sleep(600)
    head(torch.randn(4, D), torch.randint(0, C, (4,))).backward()


def test_a_dead_rank_ends_the_others():
    pool = workers.Pool(3, timeout=5)
    try:
        pool.start(step_without, 1)
        time.sleep(1)
        pool.processes[1].kill()
        outcomes = pool.outcomes()
        assert [ok for ok, _ in outcomes] == [False] * 3
        assert outcomes[1][1] is None
        assert all("RuntimeError" in outcomes[rank][1] for rank in (0, 2))
    finally:
        pool.kill()


def compiled(kind):
    """Compares a compiled step with an eager one, also after another batch size."""
    head = make_head(
        sharding=dist.group.WORLD, sampling=PartialFC(0.5) if kind == "sample" else None
    )
    backbone, shard = make_backbone(), head.shard
    weight = head.weight.to_local().detach().requires_grad_()

    def step(x, y):
        if kind == "function":
            return margin_cross_entropy(
                backbone(x), weight, y, margin=ArcFace(0.2), scale=8.0, shard=shard
            )
        return head(backbone(x), y)

    fast = torch.compile(step, backend="eager")
    for n in (6, 4):
        x, y, results = torch.randn(n, 6), torch.randint(0, C, (n,)), []
        for function in (step, fast):
            if kind == "sample":
                head.sampler.step = 3
            backbone.zero_grad()
            loss = function(x, y)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in backbone.parameters())])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("kind", ["head", "sample", "function"])
def test_a_compiled_step_of_split_classes_is_the_eager_one(kind):
    workers.run(2, compiled, kind)
