# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares a head with its classes split over processes with the head that has them all."""

import copy
import unittest.mock

import pytest
import torch
import torch.distributed as dist

from marginkernels import (
    AdaCos,
    AdaMSoftmax,
    ArcFace,
    ClassShard,
    CosFace,
    CurricularFace,
    ElasticFace,
    MarginSoftmaxHead,
    NSoftmax,
    Sharding,
    margin_cross_entropy,
)
from tests.support import simulation, workers
from tests.support.losses import C, operands
from tests.support.problems import random_problem
from tests.support.sharding import (
    ShardedProblem,
    compare_edges,
    compare_losses,
    count_collectives,
    half_rows_along_their_classes,
    my_rows,
    my_shard,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def sharded_problem(world, n, c, d, dtypes=(F32, F32, None), **settings):
    problem = random_problem(n, c, d, dtypes=dtypes, **settings)
    return ShardedProblem(**vars(problem), world=world)


@pytest.mark.parametrize("dtypes", [(F32, F32, None), (BF16, F32, None)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_gradients_within_the_budget(world, dtypes, backend, device, request):
    """Covers classes that do not divide, a rank without rows, and ignored rows."""
    if device != "cpu":
        pytest.skip("these processes exchange over gloo, on the CPU")
    problem = sharded_problem(world, 24, 61, 40, dtypes, margin=ArcFace(0.3), scale=24.0)
    problem.simulator = request.config.getoption("--simulate") if backend == "triton" else None
    problem.y[::6] = -100
    problem.check(backend)
    problem.y[:] = 1  # rank 0 holds all the targets
    problem.check(backend)


def test_gradients_that_cancel_are_exchanged_wide():
    """Sends features in their own type, and their gradients, 3e5 before they cancel, in fp32."""
    results = workers.run(2, half_rows_along_their_classes)
    dx = torch.cat([part for part, _, _ in results])
    x, w = 3 * torch.eye(4, 6), torch.eye(6)
    x.requires_grad_()
    loss = margin_cross_entropy(
        x, w, torch.arange(4), margin=ArcFace(0.5), scale=64.0, normalize="weight", reduction="sum"
    )
    torch.testing.assert_close(dx, torch.autograd.grad(loss, x)[0].half())
    assert all(types == [torch.float16, [F32]] for _, *types in results)


@pytest.mark.parametrize("world, sub_centers", [(2, 1), (3, 1), (3, 2)])
def test_every_loss_and_setting(world, sub_centers):
    """Compares row losses, statistics, all gradients and the state over several steps."""
    workers.run(world, compare_losses, sub_centers)


PROMISES = [{}, {"even_batches": True}, {"max_local_batch": 12}]


@pytest.mark.parametrize("promise", PROMISES, ids=["sizes gathered", "even", "at most"])
def test_few_classes_and_few_rows(promise):
    """Covers ranks without classes, ranks without rows, and batches without rows."""
    for c in (1, 2, 7):
        for n in (0, 10):
            workers.run(5, compare_edges, c, n, promise)
    workers.run(2, compare_edges, 7, 10, promise)
    workers.run(3, compare_edges, 7, 12, promise, [0, 4, 4, 7])  # any split


def trained(value):
    return torch.nn.Parameter(torch.tensor(value))


@pytest.mark.parametrize(
    "settings, gathers, sums, sums_backward",
    [
        (dict(), 0, 0, 0),
        (dict(sample_weight=torch.ones(4)), 1, 0, 0),
        (dict(row_margin=torch.ones(4)), 1, 0, 0),
        (dict(margin=ElasticFace()), 1, 0, 0),
        (dict(scale=trained(8.0)), 0, 0, 1),
        (dict(margin=CurricularFace()), 0, 1, 0),
        (dict(margin=NSoftmax(), scale=AdaCos(13)), 1, 0, 0),
        (dict(margin=NSoftmax(), scale=AdaCos(13, delayed=True)), 0, 0, 0),
        (dict(label_smoothing=0.1, return_stats=True, bias=True), 0, 0, 0),
    ],
)
def test_the_collectives_of_a_step(settings, gathers, sums, sums_backward):
    """Expects gathers of features and labels, a gather for each merge, and one reduction of dx."""
    for promise in PROMISES:
        for forward, backward in workers.run(2, count_collectives, settings, promise):
            forward_sums = {"allreduce_": sums} if sums else {}
            assert forward == {"_allgather_base_": 4 + gathers} | forward_sums
            backward_sums = {"allreduce_": sums_backward} if sums_backward else {}
            assert backward == {"_reduce_scatter_base_": 1} | backward_sums


def refused(function, *words):
    """Returns the error of this rank, after a look for the words in it."""
    try:
        function()
    except (ValueError, TypeError, RuntimeError) as error:
        message = f"{type(error).__name__} {error}"
        assert all(word in message for word in words), message
        return message
    raise AssertionError(f"nothing was refused with {words}")


def twice_differentiated(call, x):
    """Asks for a second derivative, which a graph that was cut would return as None."""
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    return torch.autograd.grad(dx.sum(), leaf, allow_unused=True)


def refusals():
    rank, shard = dist.get_rank(), my_shard(C)
    x, w, y = operands(n=6, dtype=F32)

    def call(x=x, w=w[shard.start : shard.stop], y=y, **settings):
        settings = dict(margin=ArcFace(0.2), scale=8.0, shard=shard) | settings
        return margin_cross_entropy(x, w, y, **settings)

    def head(**settings):
        settings = dict(margin=ArcFace(0.2), scale=8.0, sharding=dist.group.WORLD) | settings
        return MarginSoftmaxHead(settings.pop("d", 8), settings.pop("c", C), **settings)

    def most(rows):
        return Sharding(dist.group.WORLD, max_local_batch=rows)

    wrong, infinite, bad_w = y.clone(), x.clone(), w[shard.start : shard.stop].clone()
    if rank == 1:
        wrong[2], infinite[3], bad_w[4, 2] = C, torch.inf, torch.nan
    only = torch.ones(6) if rank == 0 else None
    same = [  # raised by all ranks in the same words
        refused(lambda: call(y=wrong), "y: expected labels", f"got {C} in row 2"),
        refused(lambda: call(infinite), "x: expected finite rows"),
        refused(lambda: call(w=bad_w), "w: expected finite rows"),
        refused(lambda: call(sample_weight=only), "sample_weight", "on all ranks", "float32 on ra"),
        refused(lambda: call(row_margin=only), "row_margin", "on all ranks", "float32 on rank 0"),
        refused(lambda: call(x.to(BF16) if rank else x), "x:", "float32 on rank 0", "bfloat16"),
        refused(lambda: head(d=8 + rank), "embedding_size", "8 on rank 0", "9 on rank 1"),
        refused(lambda: head(c=C + rank), "num_classes", f"{C} on rank 0", f"{C + 1} on rank 1"),
        refused(lambda: head(dtype=BF16 if rank else None), "dtype", "float32", "bfloat16"),
        refused(lambda: head(margin=CosFace() if rank else ArcFace()), "margin", "Arc", "Cos"),
        refused(lambda: head(margin=ArcFace(0.1 + rank)), "margin", "m=0.1", "m=1.1"),
        refused(lambda: head(scale=8.0 + rank), "scale", "8.0 on rank 0", "9.0 on rank 1"),
        refused(lambda: head(sharding=most(5 + rank)), "max_local_batch", "5", "6"),
    ]
    promised = ClassShard.chunked(C, dist.group.WORLD, max_local_batch=5)
    refused(lambda: call(shard=promised), "max_local_batch=5", "got 6")
    refused(lambda: call(w=w), "w: expected the", f"classes [{shard.start}, {shard.stop})", f"{C}")
    refused(lambda: ClassShard(3, 2, 5, dist.group.WORLD), "start=3", "stop=2")
    refused(lambda: ClassShard(0, 2, 5, None), "group:", "NoneType")
    refused(lambda: my_shard(C, grad_scale="mean"), "grad_scale:", "mean")
    refused(lambda: my_shard(C, max_local_batch=0.5), "max_local_batch:", "0.5")
    refused(lambda: my_shard(C, max_local_batch=5, even_batches=True), "max_local_batch:", "even")
    refused(lambda: head(sharding="gloo"), "sharding:", "process group", "device mesh", "str")
    refused(lambda: most(0), "max_local_batch:", "positive", "0")
    refused(lambda: head(device="mps"), "device:", "cpu", "mps")
    refused(lambda: head().logits(x), "logits:", "topk", "full_state_dict")
    refused(lambda: twice_differentiated(call, x), "no second derivative")
    gap = ClassShard(shard.start, shard.stop - rank, C, dist.group.WORLD)
    assert call(w=w[gap.start : gap.stop], y=torch.full_like(y, C - 1), shard=gap).isnan()
    with unittest.mock.patch("marginkernels.device_checks.checks_values", lambda _: False):
        assert call(y=wrong).isnan() and call().isfinite()  # unchecked, as on a GPU
    return same


def test_refusals():
    first, *others = (
        [message.replace("rank 1: ", "") for message in messages]
        for messages in workers.run(2, refusals)
    )
    assert all(other == first for other in others)


def evaluate(dtype):
    head = MarginSoftmaxHead(
        8, 7, margin=ArcFace(0.2), scale=8.0, bias=True, dtype=dtype, sharding=dist.group.WORLD
    )
    torch.nn.init.normal_(head.bias.to_local().detach())
    torch.manual_seed(1)
    whole = MarginSoftmaxHead(8, 7, margin=ArcFace(0.2), scale=8.0, bias=True, dtype=dtype)
    whole.load_state_dict(head.full_state_dict())
    rows = my_rows(9)
    x = torch.randn(9, 8)
    for k in (1, 4, 7):
        values, classes = head.topk(x[rows], k)
        expected = whole.topk(x, k)
        torch.testing.assert_close(values, expected[0][rows])
        assert torch.equal(classes, expected[1][rows])
    torch.nn.init.normal_(whole.weight)
    head.load_state_dict(whole.state_dict())
    torch.testing.assert_close(head.full_state_dict(), dict(whole.state_dict()))
    twin = copy.deepcopy(head)
    assert twin.weight is not head.weight and twin.shard.group is head.shard.group
    head.load_state_dict(twin.state_dict())
    return head.weight.to_local().detach()


def test_topk_and_state_dicts():
    for world in (3, 5):  # the fifth has no classes
        parts = workers.run(world, evaluate, F64 if world == 5 else F32)
        assert torch.cat(parts).shape == (7, 8)


def splits():
    group = dist.group.WORLD
    return [
        torch.arange(c)[ClassShard.chunked(c, group).start : ClassShard.chunked(c, group).stop]
        for c in (1, 3, 4, 6, 7, 9)
    ]


def shards_of_heads():
    world, device = dist.group.WORLD, torch.device("cpu")
    mesh, shard = Sharding(world, grad_scale="exact", max_local_batch=5).split(7, device)
    assert mesh.get_group() is world
    assert shard == ClassShard.chunked(7, world, grad_scale="exact", max_local_batch=5)
    assert Sharding(mesh).split(7, device) == (mesh, ClassShard.chunked(7, world))


def test_sharding_splits_over_a_group_or_a_mesh_and_else_nothing():
    workers.run(2, shards_of_heads)


def test_the_split_is_that_of_dtensor():
    for c, parts in zip((1, 3, 4, 6, 7, 9), zip(*workers.run(3, splits), strict=True), strict=True):
        expected = [*torch.arange(c).chunk(3), *[torch.arange(0)] * 3][:3]
        assert all(map(torch.equal, parts, expected))


def fresh_head(seed):
    torch.manual_seed(seed + dist.get_rank() if seed else 0)
    head = MarginSoftmaxHead(8, 6, margin=AdaMSoftmax(6), scale=8.0, sharding=dist.group.WORLD)
    return head.weight.to_local().detach(), head.margin.m.detach()


@pytest.mark.parametrize("seed", [0, 1], ids=["same seed", "own seeds"])
def test_ranks_start_from_different_weights_and_the_same_margins(seed):
    (first, margins), (second, other_margins) = workers.run(2, fresh_head, seed)
    assert not torch.equal(first, second) and torch.equal(margins, other_margins)


def test_triton_sharded_in_a_simulator():
    simulation.require("ttsem")
    problem = sharded_problem(2, 12, 37, 24, margin=ArcFace(0.3), scale=24.0)
    problem.simulator = "ttsem"
    problem.check("triton")
