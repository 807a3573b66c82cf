# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Cuts problems into the rows and classes of each rank, and holds functions for processes."""

import collections
import contextlib
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import (
    AdaCos,
    AdaFace,
    ArcFace,
    ASoftmax,
    ClassShard,
    CosFace,
    CurricularFace,
    ElasticFace,
    InterClassFilter,
    NSoftmax,
    margin_cross_entropy,
)
from tests.support import simulation, workers
from tests.support.losses import LOSSES, C, operands
from tests.support.problems import Problem

F64 = torch.float64
N = 40  # rows of losses.operands


def my_rows(n, even=False):
    """Returns this rank's part of n rows.

    Parts are even, or grow from rank to rank up to the last rank, which has none.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if even:
        return slice(n * rank // world, n * (rank + 1) // world)
    ends = [n * r * r // (world - 1) ** 2 for r in range(world)] + [n]
    return slice(ends[rank], ends[rank + 1])


def my_shard(c, **settings):
    return ClassShard.chunked(c, dist.group.WORLD, **dict(dict(grad_scale="exact"), **settings))


def cut(t, part):
    """Returns the part of a tensor, and None for None."""
    return t if t is None else t[part]


def solve_part(problem, backend, simulator, settings):
    """Returns the losses of all rows, and the gradients of this rank's rows and classes."""
    shard = my_shard(len(problem.w))
    rows, classes = my_rows(len(problem.x)), slice(shard.start, shard.stop)
    part = replace(
        problem,
        x=problem.x[rows],
        w=problem.w[classes],
        y=problem.y[rows],
        bias=cut(problem.bias, classes),
    )
    context = simulation.simulated(simulator) if simulator else contextlib.nullcontext()
    with context:
        return part.solve(
            margin_cross_entropy,
            backend=backend,
            compute_dtype=problem.compute_dtype,
            shard=shard,
            **settings,
        )


def learnable(value):
    return torch.nn.Parameter(torch.tensor(value, dtype=F64))


class MarginOfNorms(torch.nn.Module):
    """Is a margin with a parameter that is differentiable in both norms."""

    def __init__(self):
        super().__init__()
        self.weight = learnable(0.2)

    def forward(self, c, rows):
        return c - 0.1 * torch.tanh(rows.x_norm) - self.weight * torch.tanh(rows.w_norm)


def with_settings(make, **settings):
    """Returns a function that makes margin and settings anew."""

    def make_all():
        made = {k: v() if callable(v) else v for k, v in settings.items()}
        return dict(margin=make(), scale=16.0) | made

    return make_all


def several_labels():
    """Returns labels (N, 3), some twice in a row, some missing."""
    y = torch.randint(0, C, (N, 3), generator=torch.Generator().manual_seed(3))
    y[::5, 1] = y[::5, 0]
    y[1::5, 1:] = -100
    y[2] = -100
    return y


class FixedNoise(ElasticFace):
    """Draws the same numbers for the same rows, however they are split."""

    def draw(self, x, rank=0):
        noise = torch.randn(N, generator=torch.Generator().manual_seed(5))
        return noise if len(x) == N else noise[my_rows(N)]


SETTINGS = {
    "softmax with everything": with_settings(
        MarginOfNorms,
        scale=lambda: learnable(0.7),
        normalize="none",
        bias=lambda: torch.randn(C, dtype=F64),
        label_smoothing=0.1,
        z_loss=1e-3,
        focal_gamma=2.0,
        sample_weight=lambda: torch.rand(N, dtype=F64),
    ),
    "weights normalised, bias": with_settings(
        MarginOfNorms,
        scale=2.0,
        normalize="weight",
        bias=lambda: torch.randn(C, dtype=F64),
    ),
    "row margins": with_settings(
        CosFace,
        scale=lambda: learnable(16.0),
        row_margin=lambda: torch.rand(N, dtype=F64),
    ),
    "learnable table": with_settings(
        lambda: ArcFace(torch.nn.Parameter(torch.rand(C))), label_smoothing=0.2
    ),
    "learnable margin": with_settings(lambda: ArcFace(torch.nn.Parameter(torch.tensor(0.3)))),
    "transform, learnable scale": with_settings(
        CurricularFace, scale=lambda: learnable(8.0), label_smoothing=0.1
    ),
    "several labels": with_settings(
        lambda: ArcFace(torch.nn.Parameter(torch.rand(C))),
        scale=lambda: learnable(8.0),
        y=lambda: several_labels(),
        other_labels="negatives",
        label_weights=lambda: torch.rand(N, 3, dtype=F64),
        label_smoothing=0.1,
        bias=lambda: torch.randn(C, dtype=F64),
    ),
    "several labels, transform": with_settings(
        lambda: CurricularFace(alpha=0.3), y=lambda: several_labels(), other_labels="negatives"
    ),
    "AdaCos": with_settings(NSoftmax, scale=lambda: AdaCos(C)),
    "AdaCos delayed": with_settings(NSoftmax, scale=lambda: AdaCos(C, delayed=True)),
    "AdaFace": with_settings(lambda: AdaFace(t_alpha=0.3)),
    "CurricularFace": with_settings(lambda: CurricularFace(alpha=0.3)),
    "A-Softmax": with_settings(lambda: ASoftmax(3), scale=1.0, normalize="weight"),
    "ElasticFace": with_settings(lambda: FixedNoise()),
    "ElasticFace+ in a filter": with_settings(
        lambda: InterClassFilter(FixedNoise(std=0.2, plus=True), 0.3)
    ),
} | {
    name: with_settings(loss.make, scale=loss.scale, normalize=loss.normalize)
    for name, loss in LOSSES.items()
    if not name.startswith("ElasticFace")
}


def solve_step(x, w, y, settings, modules, shard):
    """Makes one step and returns its losses, gradients and state.

    ``settings`` hold a shard, or the step has all rows and classes. Returned are the losses of all
    rows with their statistics, gradients of an uneven sum of the losses, and the state after the
    step. The gradients are by this rank's rows and classes and by everything learnable.
    """
    rows, classes = my_rows(len(x)), shard.rows(1)
    of_classes = shard.rows(settings.get("sub_centers", 1))
    parts = dict(
        x=rows, w=of_classes, bias=classes, sample_weight=rows, row_margin=rows, label_weights=rows
    )
    y = settings.get("y", y)
    given = dict(settings, x=x, w=w, y=y)
    leaves = {k: given[k].detach().clone() for k in parts if k in given}
    sharded = "shard" in settings
    if sharded:
        leaves = {k: t[parts[k]] for k, t in leaves.items()}
        given["y"] = y[rows]
    leaves = {k: t.requires_grad_() for k, t in leaves.items()}
    losses, stats = margin_cross_entropy(
        **dict(given, **leaves), reduction="none", backend="reference", return_stats=True
    )
    upstream = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    leaves |= {f"learnt {k}": t for m in modules for k, t in m.named_parameters()}
    if isinstance(given["scale"], torch.nn.Parameter):
        leaves["scale"] = given["scale"]
    gradients = torch.autograd.grad((losses * upstream).sum(), leaves.values())
    gradients = dict(zip(leaves, gradients, strict=True))
    if not sharded:
        gradients |= {k: gradients[k][part] for k, part in parts.items() if k in gradients}
    state = {k: t.clone() for m in modules for k, t in m.named_buffers()}
    return [losses.detach(), *stats], gradients, state


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def compare_losses(sub_centers):
    """Compares each step of each loss with that of a process that has all; fp64, to rounding."""
    batches = [operands(seed=seed, sub_centers=sub_centers) for seed in range(2)]
    shard = my_shard(C)
    for name, make in SETTINGS.items():
        solutions = []
        for more in (dict(shard=shard), {}):
            torch.manual_seed(1)
            settings = make() | more | dict(sub_centers=sub_centers)
            modules = [v.double() for v in settings.values() if isinstance(v, torch.nn.Module)]
            steps = [solve_step(*batch, settings, modules, shard) for batch in batches]
            for module in modules:
                module.eval()
            steps.append(solve_step(*batches[0], settings, modules, shard))
            assert same(steps[-1][2], steps[-2][2]), f"{name}: its state moves in evaluation"
            solutions.append(steps)
        torch.testing.assert_close(
            *solutions, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@dataclass
class ShardedProblem(Problem):
    """Is a problem that ``world`` processes solve."""

    world: int = 2
    simulator: str | None = None

    def solve_fused(self, backend, **more):
        problem = Problem(self.x, self.w, self.y, self.compute_dtype, self.bias, self.settings)
        results = workers.run(self.world, solve_part, problem, backend, self.simulator, more)
        losses, *gradients = zip(*results, strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        return [losses[0].detach(), *map(torch.cat, gradients)]


def compare_edges(c, n, promise, cuts=None):
    """Compares the mean loss and its gradients for few classes and rows; parts may be empty."""
    even = "even_batches" in promise
    x, w = torch.randn(n, 8, dtype=F64), torch.randn(c, 8, dtype=F64)
    y, shard = torch.randint(0, c, (n,)), my_shard(c, **promise)
    if cuts is not None:
        start, stop = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
        shard = replace(shard, start=start, stop=stop)
    rows, classes = my_rows(n, even), slice(shard.start, shard.stop)
    settings = dict(margin=ArcFace(0.3), scale=16.0, bias=torch.ones(c, dtype=F64))
    results = []
    for sharded in (True, False):
        own = dict(settings)
        leaves = [t.clone() for t in (x, w)]
        if sharded:
            leaves = [x[rows].clone(), w[classes].clone()]
            own |= dict(shard=shard, bias=settings["bias"][classes])
        leaves = [t.requires_grad_() for t in leaves]
        loss = margin_cross_entropy(*leaves, y[rows] if sharded else y, **own)
        gradients = torch.autograd.grad(loss, leaves)
        if not sharded:
            gradients = [gradients[0][rows], gradients[1][classes]]
        results.append([loss, *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12, msg=f"{c} classes, {n} rows")


class Collectives(TorchDispatchMode):
    """Counts collectives by the name of the operator, and notes the types of their tensors."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        self.types = collections.defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            self.counts[name] += 1
            self.types[name] += [t.dtype for t in args if isinstance(t, torch.Tensor)][:1]
        return func(*args, **(kwargs or {}))


def half_rows_along_their_classes():
    """Returns dx of un-normalised fp16 rows, and the types of features and dx on their way."""
    w = torch.eye(6, dtype=torch.float16)
    x, shard = 3 * w[:4], my_shard(len(w))
    own = x[my_rows(4, even=True)].requires_grad_()
    with Collectives() as seen:
        loss = margin_cross_entropy(
            own, w[shard.start : shard.stop], torch.arange(4)[my_rows(4, even=True)], shard=shard,
            margin=ArcFace(0.5), scale=64.0, normalize="weight", reduction="sum",
        )  # fmt: skip
        (dx,) = torch.autograd.grad(loss, own)
    features = next(t for t in seen.types["_allgather_base_"] if t.is_floating_point)
    return dx, features, seen.types["_reduce_scatter_base_"]


def count_collectives(settings, promise):
    """Returns how often each collective runs, forward and backward."""
    c = 13
    shard = my_shard(c, **promise)
    if settings.get("bias"):
        settings = dict(settings, bias=torch.zeros(shard.size))
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(shard.size, 8, requires_grad=True)
    with Collectives() as forward:
        settings = dict(margin=ArcFace(0.3), scale=16.0, shard=shard) | settings
        loss = margin_cross_entropy(x, w, torch.randint(0, c, (4,)), **settings)
    with Collectives() as backward:
        (loss[0] if settings.get("return_stats") else loss).backward()
    return forward.counts, backward.counts
