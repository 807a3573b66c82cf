# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests forwards that are made again within backward: they see what the first saw, or fail."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from marginkernels import ArcFace, ElasticFace, NSoftmax, PartialFC, margin_cross_entropy
from marginkernels.generators import StepGenerators
from tests.support.losses import C
from tests.support.stateful import STATEFUL, batches, head_of, same, state_of

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
SAMPLED = dict(margin=ArcFace(), scale=16.0, sampling=PartialFC(0.7))
# the name in the error, where it is not that of the case
NAMED = {
    "L-Softmax": "LSoftmax",
    "A-Softmax": "ASoftmax",
    "filtered": "LSoftmax",
    "ElasticFace+": "ElasticFace",
    "AdaCos delayed": "AdaCos",
    "sampled": "sampling",
}


@REENTRANT
@pytest.mark.parametrize("name", [*STATEFUL, "sampled"])
def test_what_has_moved_on_is_refused(name, reentrant):
    """Refuses the second forward before a state moves again."""
    make = (STATEFUL | {"sampled": lambda: SAMPLED})[name]
    head, plain = head_of(make()), head_of(make())
    plain.load_state_dict(head.state_dict())
    x, y = batches()[0]
    plain(x, y)
    loss = checkpoint(head, x.requires_grad_(), y, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=f"{NAMED.get(name, name)}.*out of the checkpointed"):
        loss.backward()
    assert same(state_of(plain), state_of(head))


@REENTRANT
@pytest.mark.parametrize("name", ["tensor", "default generator", "sample", "evaluation"])
def test_what_has_not_is_repeated(name, reentrant):
    make = {
        "tensor": lambda: dict(margin=ArcFace(torch.tensor(0.3)), scale=torch.tensor(16.0)),
        "default generator": lambda: dict(margin=ElasticFace(std=0.1, plus=True), scale=16.0),
        "sample": lambda: dict(margin=NSoftmax(), scale=16.0),
        "evaluation": STATEFUL["AdaFace"],
    }[name]
    head = head_of(make()).train(name != "evaluation")
    x, y = batches()[0]

    def loss(x, y):
        if name == "sample":  # drawn from torch's default generator
            return margin_cross_entropy(
                x, head.weight, y, margin=head.margin, scale=16.0, sampling=PartialFC(0.7)
            )
        return head(x, y)

    gradients = []
    for function in (loss, lambda x, y: checkpoint(loss, x, y, use_reentrant=reentrant)):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        head.zero_grad()
        function(leaf, y).backward()
        gradients.append((leaf.grad, head.weight.grad))
    assert all(map(torch.equal, *gradients))


def test_a_generator_of_the_callers_own_is_refused():
    x, y = batches()[0]
    w, generator = torch.randn(C, 8, requires_grad=True), torch.Generator()
    settings = dict(margin=NSoftmax(), scale=16.0, sampling=PartialFC(0.7, generator=generator))
    loss = checkpoint(lambda: margin_cross_entropy(x, w, y, **settings), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"PartialFC\(generator=\)"):
        loss.backward()


@pytest.mark.parametrize("outer", ["checkpoint", "compile"])
def test_compiled_losses_are_refused_too(outer):
    head, (x, y) = head_of(STATEFUL["AdaFace"]()), batches()[0]
    torch.compiler.reset()
    inner = head if outer == "compile" else torch.compile(head, backend="aot_eager", fullgraph=True)

    def loss(x, y):
        return checkpoint(inner, x, y, use_reentrant=False)

    if outer == "compile":
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = loss(x.requires_grad_(), y)
    with pytest.raises(RuntimeError, match=r"AdaFace.*out of the checkpointed"):
        value.backward()


def test_cuda_graphs_do_not_repeat_one_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    generators = StepGenerators(3, "ElasticFace(seed=)")
    assert isinstance(generators(torch.device("cpu"), 0), torch.Generator)
    with pytest.raises(RuntimeError, match=r"ElasticFace\(seed=\): .*CUDA graph.*default generat"):
        generators(torch.device("cuda"), 0)
    assert generators.step == 1


@pytest.mark.filterwarnings("error:Dynamo:UserWarning")
def test_compiled_samples_differ_and_do_not_recompile():
    head, (x, y) = head_of(SAMPLED), batches()[0]
    plain = head_of(SAMPLED)
    plain.load_state_dict(head.state_dict())
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, backend=counter)
    losses, frames = [], []
    for _ in range(4):
        losses.append(compiled(x, y).item())
        frames.append(counter.frame_count)
        assert losses[-1] == pytest.approx(plain(x, y).item())
    assert len(set(losses)) == 4 and len(set(frames[1:])) == 1


# torch warns of a leak that backward(create_graph=True) makes, as MAML and its kin call it
@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_first_derivative_that_makes_a_graph_unpacks_what_it_saved_once():
    head = head_of(dict(margin=ArcFace(), scale=16.0))
    x, y = batches()[0]
    x.requires_grad_()
    checkpoint(head, x, y, use_reentrant=False).backward(create_graph=True)
    (expected,) = torch.autograd.grad(head(x, y), x)
    assert torch.equal(x.grad, expected)
