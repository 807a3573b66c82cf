# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles steps of heads whose classes are split over processes, and the recipes of the docs."""

import copy
import functools
import re
import unittest.mock
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from marginkernels import (
    ArcFace,
    CosFace,
    CurricularFace,
    ElasticFace,
    MarginSoftmaxHead,
    PartialFC,
    Sharding,
    optim,
)
from marginkernels.distributed.shard import local
from marginkernels.modules import COMPILES_STEPS
from tests.support import workers
from tests.support.sharding import my_rows

C, D = 11, 8
LOSSES = {
    "plain": lambda: dict(margin=ArcFace(0.3), scale=16.0, backend="auto"),
    "terms": lambda: dict(
        margin=CosFace(0.2),
        scale=torch.nn.Parameter(torch.tensor(2.0)),
        normalize="none",
        bias=True,
        label_smoothing=0.1,
    ),
    "state": lambda: dict(margin=CurricularFace(alpha=0.3), scale=16.0),
}
EVEN = dict(even_batches=True)


def make(sharding, classes=C, **settings):
    torch.manual_seed(1)
    head = dict(margin=ArcFace(0.3), scale=16.0, backend="reference") | settings
    return MarginSoftmaxHead(D, classes, sharding=Sharding(dist.group.WORLD, **sharding), **head)


def batches(classes=C, sizes=(12, 12)):
    """Returns this rank's rows and labels of each step."""
    for seed, n in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(n, D, generator=generator), torch.arange(n) % classes
        y[3] = -100
        rows = my_rows(n, even=True)
        yield x[rows], y[rows]


def solved(function, heads, x, y):
    """Returns losses, gradients and states; the weights of the losses keep gradients apart."""
    leaf = x.clone().requires_grad_()
    losses = function(heads, leaf, y)
    total = sum((1 + i) * loss for i, loss in enumerate(losses))
    parameters = [p for p in heads.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [leaf, *parameters])
    state = {name: local(t) for name, t in heads.state_dict().items()}
    return [*losses, *map(local, gradients)], state


def compare(names, compiler, classes=C, sizes=(12, 12)):
    """Compares compiled losses, all in one graph, with eager ones over several steps."""
    heads = torch.nn.ModuleList(make(EVEN, classes, **LOSSES[name]()) for name in names)
    twins = copy.deepcopy(heads)
    counter = CompileCounterWithBackend(compiler)

    def losses(heads, x, y):
        return [head(x, y) for head in heads]

    torch.compiler.reset()
    compiled = torch.compile(losses, backend=counter, fullgraph=True)
    for x, y in batches(classes, sizes):
        torch.testing.assert_close(solved(compiled, heads, x, y), solved(losses, twins, x, y))
    return counter.frame_count


@pytest.mark.parametrize("compiler, names", [("aot_eager", list(LOSSES)), ("inductor", ["plain"])])
def test_one_graph_gives_losses_gradients_and_states_of_eager_steps(compiler, names):
    pool = workers.Pool(2, timeout=300)  # a compiler takes long on a busy machine
    try:
        assert pool.run(compare, names, compiler) == [1, 1]
    finally:
        pool.kill()


def test_one_graph_takes_batches_of_any_size_and_ranks_without_classes():
    graphs = workers.run(3, compare, ["plain"], "eager", 4, (12, 18, 24))
    assert max(graphs) <= 2  # once for the first size, once for all others


def compare_steps(kind, settings):
    head = make(EVEN, bias=True)
    twin = copy.deepcopy(head)
    torch.compiler.reset()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    optimizers = [kind(each, **settings) for each in (head, twin)]
    for x, y in batches():
        for function, optimizer in zip((compiled, twin), optimizers, strict=True):
            function(x, y).backward()
            optimizer.step()
        states = [[local(t) for t in each.state_dict().values()] for each in (head, twin)]
        torch.testing.assert_close(*states)


def test_a_compiled_backward_moves_the_classes_of_each_rank():
    if not COMPILES_STEPS:
        pytest.skip("torch.compile leaves the step to eager PyTorch before torch 2.13")
    workers.run(2, compare_steps, optim.SGD, dict(lr=0.5, momentum=0.9))


def breaks(settings, sharding):
    """Compares a head that cannot be in a graph, and returns whether a whole graph is refused."""
    head = make(sharding, **settings)
    torch.compiler.reset()
    x, y = next(batches())
    expected = copy.deepcopy(head)(x, y)
    torch.testing.assert_close(torch.compile(head, backend="aot_eager")(x, y), expected)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(head, backend="aot_eager", fullgraph=True)(x, y)


@pytest.mark.parametrize(
    "settings, sharding",
    [
        ({}, {}),
        ({}, dict(max_local_batch=12)),
        (dict(sampling=PartialFC(0.5)), EVEN),
        (dict(margin=ElasticFace(std=0.2, seed=3)), EVEN),
    ],
    ids=["rows not promised", "rows at most", "a sample", "seeded margins"],
)
def test_what_breaks_the_graph_computes_the_same(settings, sharding):
    workers.run(2, breaks, settings, sharding)


def bad_label():
    head = torch.compile(make(EVEN), backend="aot_eager", fullgraph=True)
    x, y = next(batches())
    head(x, y)
    y[1] = C
    with pytest.raises(Exception, match=f"got {C} in row 1"):
        head(x, y)


def test_values_are_checked_in_a_graph_too():
    workers.run(2, bad_label)


def recipes(page):
    """Returns the code of the page's section on torch.compile, block by block."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    section = re.search(r"^## torch\.compile$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


def follow(number, stance):
    """Runs a recipe, and returns its loss and the parameters after its step."""
    torch.compiler.reset()
    torch.manual_seed(5)
    names = dict(torch=torch, dist=dist, Sharding=Sharding, CosFace=CosFace)
    names |= dict(MarginSoftmaxHead=MarginSoftmaxHead)
    names |= dict(DistributedDataParallel=DistributedDataParallel)
    x, y, backbone = torch.randn(6, 512), torch.arange(6), torch.nn.Linear(512, 512)
    rows = my_rows(6, even=True) if dist.is_initialized() else slice(0, 6)
    names |= dict(images=x[rows], labels=y[rows], backbone=backbone)
    quick = functools.partial(torch.compile, backend="aot_eager")
    with unittest.mock.patch("torch.compile", quick), torch.compiler.set_stance(stance):
        exec(recipes("distributed.md")[number], names)
    parameters = [*backbone.parameters(), *names["head"].parameters()]
    return [names["loss"].detach(), *(local(p.detach()) for p in parameters)]


def compare_recipe(number):
    torch.testing.assert_close(follow(number, "default"), follow(number, "force_eager"))


@pytest.mark.parametrize("number, world", [(0, 1), (1, 2), (2, 2)])
def test_a_recipe_of_the_docs_takes_the_step_that_it_takes_without_a_compiler(number, world):
    assert len(recipes("distributed.md")) == 3
    if world == 1:
        compare_recipe(number)
    else:
        workers.run(world, compare_recipe, number)
