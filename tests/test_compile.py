# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the ops and the head under the dispatcher: opcheck, torch.compile, compiled checks."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from marginkernels import (
    AdaCos,
    ArcFace,
    CurricularFace,
    ElasticFace,
    PartialFC,
    margin_cross_entropy,
    optim,
)
from marginkernels.modules import COMPILES_STEPS
from marginkernels.update import Update
from tests.support import stateful, sweeps
from tests.support.losses import LOSSES, operands
from tests.support.losses import C as CLASSES
from tests.support.small import C, D, N, batch, make_head
from tests.support.updates import Case, opcheck, skip_without_updates


@pytest.mark.parametrize("save_tiles", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compute_dtype, save_tiles, backend, device):
    sweeps.opcheck(compute_dtype, save_tiles, backend, device)


@pytest.mark.parametrize("case", [Case(sampled=True), Case("adamw", compute_dtype=torch.bfloat16)])
def test_opcheck_of_a_step(case, backend, device):
    skip_without_updates(backend)
    opcheck(backend, case, device)


def test_opcheck_of_the_checks(device):
    y, value = torch.arange(4, device=device), torch.rand(3, device=device)
    torch.library.opcheck(torch.ops.marginkernels.checked, (y, value, 0.0, 1.0, "value"))
    torch.library.opcheck(torch.ops.marginkernels.checked_labels, (y, 4, -100))


@pytest.mark.parametrize("plain", [False, True])
def test_compile_is_whole_and_does_not_recompile(plain, backend, device):
    """Compiles at most two whole graphs for five numbers of rows and five values in tensors.

    The call needs every output of the sweep, or few. An output that is not needed has no gradient,
    which a compiled graph hands over as zeros.
    """
    extras = {} if plain else dict(bias=True, label_smoothing=0.1, normalize="none")
    margin, scale = ArcFace(torch.tensor(0.1)), torch.nn.Parameter(torch.tensor(1.0))
    head = make_head(backend, device, margin=margin, scale=scale, **extras).to(device)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, head):
        loss, stats = head(x, y, return_stats=True)
        return loss, *stats

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for i, n in enumerate([12, 9, 20, 33, 7]):
        x, y = batch(device, n)
        y[1] = head.ignore_index
        head.margin.m.fill_(0.1 * i)
        head.scale.data.fill_(1.0 + i)
        results = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            loss, *stats = function(leaf, y, head)
            gradients = torch.autograd.grad(loss, (leaf, *head.parameters()))
            results.append([loss, *stats, *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # once for the first size, once for all others


@pytest.mark.parametrize("attribute", ["scale", "m"])
def test_compile_recompiles_at_most_once_for_a_number(attribute, backend, device):
    head = make_head(backend, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: head(x, y), backend=counter, fullgraph=True)
    x, y = batch(device)
    for i in range(5):
        setattr(head if attribute == "scale" else head.margin, attribute, 0.5 + 0.25 * i)
        torch.testing.assert_close(compiled(x, y), head(x, y))
    assert counter.frame_count <= 2


# Losses without a state, to add to those of stateful.py. A compiled graph might drop the rounding
# of operands, as it might lose a state.
STEADY = {
    "fused": lambda: dict(margin=ArcFace(), scale=16.0, backend="auto"),
    "scheduled": lambda: dict(margin=ArcFace(torch.tensor(0.1)), scale=torch.tensor(8.0)),
    "rounded": lambda: dict(
        margin=ArcFace(), scale=16.0, normalize="weight", compute_dtype=torch.bfloat16
    ),
    "rounded first": lambda: dict(
        margin=CurricularFace(alpha=0.3), scale=16.0, compute_dtype=torch.bfloat16
    ),
}
# inductor gets a few losses only, because it compiles each for seconds
COMPILED = {
    "aot_eager": [name for name in stateful.STATEFUL | STEADY if "Elastic" not in name],
    "inductor": ["fused", "filtered", "AdaCos delayed", "rounded", "rounded first"],
}


@pytest.mark.parametrize("compiler", COMPILED)
def test_gradients_and_states_of_compiled_losses(compiler, device):
    """Compares compiled losses, all in one graph, with eager ones over several steps.

    Backward must use the state that forward saw, not the one that forward left behind. Operands
    that are rounded to bfloat16 must stay rounded.
    """
    makers = [(stateful.STATEFUL | STEADY)[name] for name in COMPILED[compiler]]
    heads = torch.nn.ModuleList(stateful.head_of(make()) for make in makers).to(device)
    twins = copy.deepcopy(heads)

    def losses(heads, x, y):
        return [head(x, y) for head in heads]

    torch.compiler.reset()  # graphs of other tests count towards the limit of recompilations
    compiled = torch.compile(losses, backend=compiler, fullgraph=True)
    for step, (x, y) in enumerate(stateful.batches()):
        x, y = x.to(device), y.to(device)
        results = []
        for function, each in ((compiled, heads), (losses, twins)):
            leaf = x.clone().requires_grad_()
            values = function(each, leaf, y)
            for head in each:  # a schedule may change m between forward and backward
                if isinstance(getattr(head.margin, "m", None), torch.Tensor):
                    head.margin.m.fill_(0.2 * step)
            dx = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
            dw = torch.autograd.grad(sum(values), list(each.parameters()))
            results.append([values, dx, dw, each.state_dict()])
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("error::UserWarning")
def test_every_loss_with_sizes_and_numbers_that_are_not_fixed():
    """Compiles all losses into one whole graph, which takes two batch sizes without a warning."""
    margins = [loss.make() for loss in LOSSES.values()]
    for margin in margins:
        if isinstance(margin, ElasticFace):
            margin.generators = None  # torch.compile knows the default generator only
    settings = [
        loss.accepted(scale=loss.scale, normalize=loss.normalize, z_loss=0.1)
        for loss in LOSSES.values()
    ]
    margins += [ArcFace(torch.rand(CLASSES)), ArcFace(torch.tensor(0.2))]
    settings.append(dict(scale=torch.tensor(8.0)))
    settings.append(dict(scale=AdaCos(CLASSES), sampling=PartialFC(0.7)))

    def losses(x, w, y, margins, settings):
        return [
            margin_cross_entropy(x, w, y, margin=margin, **each)
            for margin, each in zip(margins, settings, strict=True)
        ]

    torch.compiler.reset()
    compiled = torch.compile(losses, backend="eager", dynamic=True, fullgraph=True)
    twins = copy.deepcopy((margins, settings))
    for n in (12, 9):
        results = []
        for function, modules in ((compiled, (margins, settings)), (losses, twins)):
            torch.manual_seed(n)
            results.append(function(*operands(n=n, dtype=torch.float32), *modules))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_step_inside_a_compiled_backward(compiler, backend, device, monkeypatch):
    """Compiles one whole graph for three learning rates, and updates in place."""
    skip_without_updates(backend)
    if not COMPILES_STEPS:
        pytest.skip("torch.compile leaves the step to eager PyTorch before torch 2.13")
    head = make_head(backend, device, bias=True)
    twin = copy.deepcopy(head)
    optimizers = [optim.AdamW(each, lr=0.1) for each in (head, twin)]
    counter, in_place = CompileCounterWithBackend(compiler), []
    compiled = torch.compile(head, backend=counter, fullgraph=True)
    written_to = Update.written_to

    def written(update, given):
        in_place.append(given[0].data_ptr() == update.weight().data_ptr())
        return written_to(update, given)

    for step in range(3):
        x, y = batch(device)
        with monkeypatch.context() as patched:
            patched.setattr(Update, "written_to", written)
            compiled(x, y).backward()
        twin(x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        torch.testing.assert_close(list(head.parameters()), list(twin.parameters()))
    assert counter.frame_count == 1
    # aot_eager makes the graph functional, and copies
    assert all(in_place) or compiler == "aot_eager"


def test_what_a_compiled_backward_keeps_outlives_it(backend, device):
    """Accumulates, and goes on in eager PyTorch: a graph uses the memory of its buffers again."""
    skip_without_updates(backend)
    if not COMPILES_STEPS:
        pytest.skip("torch.compile leaves the step to eager PyTorch before torch 2.13")
    x, y = batch(device, n=32)
    backbone = torch.nn.Sequential(torch.nn.Linear(D, 32), torch.nn.ReLU(), torch.nn.Linear(32, D))
    backbone = backbone.to(device)

    def loss(modules, x, y):
        return modules[1](modules[0](x), y)

    modules = backbone, make_head(backend, device)
    compiled, twins, results = torch.compile(loss, fullgraph=True), copy.deepcopy(modules), []
    for function, pair in ((compiled, modules), (loss, twins)):
        optimizer = optim.SGD(pair[1], lr=0.5, momentum=0.9)
        with optimizer.accumulate():
            function(pair, x, y).backward()
        function(pair, x.flip(0), y).backward()
        optimizer.step()
        results.append([pair[1].weight.detach(), loss(pair, x, y)])
    torch.testing.assert_close(*results)


def test_a_compiled_step_may_follow_a_validation_of_another_head():
    if not COMPILES_STEPS:
        pytest.skip("torch.compile leaves the step to eager PyTorch before torch 2.13")
    for kind, validates in ((optim.AdamW, True), (optim.SGD, False)):
        head = make_head("reference", "cpu")
        with torch.no_grad():
            head.weight.mul_(2)  # its version is not 0
        before, optimizer = head.weight.detach().clone(), kind(head, lr=0.1)
        compiled = torch.compile(head, backend="aot_eager")
        x, y = batch("cpu")
        if validates:
            with torch.no_grad():
                compiled(x, y)
        compiled(x, y).backward()
        optimizer.step()
        assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_backward_to_other_inputs_moves_nothing(compiler):
    if not COMPILES_STEPS:
        pytest.skip("torch.compile leaves the step to eager PyTorch before torch 2.13")
    head = make_head("reference", "cpu")
    twin, optimizer = copy.deepcopy(head), optim.SGD(head, lr=0.1)
    compiled = torch.compile(head, backend=compiler, fullgraph=True)
    x, y = batch("cpu")
    x.requires_grad_()
    (dx,) = torch.autograd.grad(compiled(x, y), x)
    torch.testing.assert_close(dx, torch.autograd.grad(twin(x, y), x)[0])
    assert torch.equal(head.weight, twin.weight)
    compiled(x, y).backward()
    optimizer.step()
    twin(x, y).backward()
    torch.testing.assert_close(head.weight, twin.weight - 0.1 * twin.weight.grad)


def test_export_for_batches_of_any_size(backend, device):
    head = make_head(backend, device)
    batches = torch.export.Dim("batches", min=2)
    program = torch.export.export(head, batch(device), dynamic_shapes=({0: batches}, {0: batches}))
    for n in (N, 7):
        x, y = batch(device, n)
        torch.testing.assert_close(program.module()(x, y), head(x, y))


def test_checks_survive_compilation(backend, device):
    if device != "cpu":
        pytest.skip("values on an accelerator are only checked on request")
    head = torch.compile(make_head(backend, device), backend="aot_eager", fullgraph=True)
    x, y = batch(device)
    y[1] = C
    with pytest.raises(Exception, match=f"got {C} in row 1"):
        head(x, y)
