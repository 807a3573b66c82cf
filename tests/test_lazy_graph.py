# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the graph of cosines that nobody computes: what a backward pass through them may do."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from marginkernels import LazyCosine, margin_cross_entropy
from tests.support.cosines import LOSS, C, N, dense, operands, same


def below(t):
    with torch._C.DisableTorchFunctionSubclass():
        return torch.exp(t)


@pytest.mark.filterwarnings("ignore:LazyCosine")
@pytest.mark.parametrize("ask", [lambda t: t.topk(3).values, below], ids=["topk", "below python"])
def test_second_derivatives_are_those_of_the_tensor(ask):
    x, w, _ = operands()

    def penalty(t):
        g = torch.autograd.grad((ask(t) ** 2).sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum((part**2).sum() for part in g), (x, w))

    same(penalty(LazyCosine(x, w)), penalty(dense(x, w)))


@pytest.mark.filterwarnings("ignore:LazyCosine")
def test_weights_that_come_from_the_embeddings_share_their_gradient():
    x, _, _ = operands()
    gradients = []
    for make in (LazyCosine, dense):
        t = make(x, 2 * x)
        other = make(x, 2 * x)
        gradients.append(torch.autograd.grad(t.topk(2).values.sum() + below(other).sum(), x))
    same(*gradients)


@pytest.mark.filterwarnings("ignore:LazyCosine")
def test_its_own_gradient_is_refused():
    x, w, y = operands()
    for ask in (
        lambda t: torch.autograd.grad(t.loss(y, **LOSS), t, allow_unused=True),
        lambda t: torch.autograd.grad(t.max(1).values.sum() + t.sum(), [t]),
        lambda t: t.backward(torch.ones(N, C), inputs=[t]),
        lambda t: t.retain_grad(),
    ):
        with pytest.raises(RuntimeError, match=r"no gradient \(N, C\). Ask for the gradients of x"):
            ask(LazyCosine(x, w))


@pytest.mark.filterwarnings("ignore:LazyCosine")
def test_a_backward_pass_may_begin_at_it():
    x, w, _ = operands()
    upstream = torch.linspace(0.5, 1.5, N * C, dtype=torch.float64).view(N, C)
    gradients = []
    for make in (LazyCosine, dense):
        t, other = make(x, w), make(x, w)
        both = [t, t.max(1).values.sum()]
        gradients.append(torch.autograd.grad(both, (x, w), [upstream, None]))
        other.backward(upstream)
        gradients[-1] += (x.grad, w.grad)
        x.grad = w.grad = None
    same(*gradients)


@pytest.mark.filterwarnings("ignore:LazyCosine")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_may_end_with_it(reentrant):
    x, w, y = operands()
    gradients = []
    for make in (LazyCosine, dense):
        t = checkpoint(lambda x: make(2 * x, w), x, use_reentrant=reentrant)  # noqa: B023
        loss = t.loss(y, **LOSS) if make is LazyCosine else margin_cross_entropy(x, w, y, **LOSS)
        (loss + t.exp().sum()).backward()
        gradients.append((x.grad, w.grad))
        x.grad = w.grad = None
    same(*gradients)


@pytest.mark.filterwarnings("ignore:LazyCosine")
@pytest.mark.parametrize(
    "scale", [lambda g: 2 * g, lambda g: g / 0.5, lambda g: g * torch.tensor(2.0)]
)
def test_a_hook_scales_all_of_the_gradient(scale):
    x, w, y = operands()
    gradients = []
    for hooked in (True, False):
        lazy = LazyCosine(x, w)
        loss = lazy.loss(y, **LOSS) + lazy.exp().sum()
        if hooked:  # after it has become the tensor
            lazy.register_hook(scale)
        gradients.append(torch.autograd.grad(loss if hooked else 2 * loss, (x, w)))
    same(*gradients)
    lazy = LazyCosine(x, w)
    lazy.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(RuntimeError, match="gradient of a LazyCosine is one of x and one of w"):
        lazy.loss(y, **LOSS).backward()
