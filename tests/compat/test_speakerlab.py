# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares 3D-Speaker's head with a loop that has its calls and formulas."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from marginkernels.compat.speaker import AddMarginLoss, ArcMarginLoss, CosineClassifier
from tests.support import workers

N, C, D, F64 = 12, 11, 6, torch.float64


def formula(cosine, label, m, s, kind):
    """Computes the loss from 3D-Speaker's formulas."""
    m = cosine.new_tensor(m)
    phi = cosine * m.cos() - (1 - cosine**2).sqrt() * m.sin()
    past = cosine - 1 - torch.cos(torch.pi - m)
    phi = {
        "arc": torch.where(cosine > torch.cos(torch.pi - m), phi, past),
        "easy": torch.where(cosine > 0, phi, cosine),
        "add": cosine - m,
    }[kind]
    return F.cross_entropy(s * torch.where(F.one_hot(label, C) == 1, phi, cosine), label)


def criterion(kind, m):
    loss = AddMarginLoss(30.0) if kind == "add" else ArcMarginLoss(30.0, easy_margin=kind == "easy")
    loss.update(margin=m)  # as the scheduler of margins does
    return loss


def accuracy(output, label):
    """Measures as the loop of the trainer does."""
    _, nearest = output.topk(1)
    return nearest.squeeze(-1).eq(label).float().mean()


@pytest.mark.parametrize("m", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["arc", "easy", "add"])
def test_loss_and_gradients_are_those_of_the_formulas(kind, m):
    torch.manual_seed(0)
    classifier = CosineClassifier(D, out_neurons=C).double()
    x, label = torch.randn(N, D, dtype=F64), torch.randint(C, (N,))
    with torch.no_grad():  # some rows lie beyond pi - m
        x[:4] = 0.1 * x[:4] - classifier.weight[label[:4]]
    leaves = (x.requires_grad_(), classifier.weight)
    cosine = F.linear(F.normalize(x), F.normalize(classifier.weight))
    exact = formula(cosine, label, m, 30.0, kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyCosine")
        output = classifier(x)
        ours = [criterion(kind, m)(output, label), criterion(kind, m)(cosine, label)]
        assert accuracy(output, label) == accuracy(cosine, label)
    wanted, *found = (torch.autograd.grad(t, leaves, retain_graph=True) for t in (exact, *ours))
    for loss, gradients in zip(ours, found, strict=True):
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(gradients, wanted)
    with pytest.warns(UserWarning, match="mul needs all"):
        other = formula(classifier(x), label, m, 30.0, kind)
    torch.testing.assert_close(other, exact)


def test_layers_before_have_the_names_and_shapes_of_the_trainer():
    classifier = CosineClassifier(D, num_blocks=2, inter_dim=5, out_neurons=C)
    shapes = {name: tuple(p.shape) for name, p in classifier.named_parameters()}
    assert shapes == {
        "weight": (C, 5),
        "blocks.0.linear.weight": (5, D, 1),
        "blocks.0.nonlinear.batchnorm.weight": (5,),
        "blocks.0.nonlinear.batchnorm.bias": (5,),
        "blocks.1.linear.weight": (5, 5, 1),
        "blocks.1.nonlinear.batchnorm.weight": (5,),
        "blocks.1.nonlinear.batchnorm.bias": (5,),
    }
    x = torch.randn(N, D)
    columns = classifier.blocks[0].linear(x[..., None]).squeeze(-1)
    torch.testing.assert_close(
        classifier.blocks[0](x), classifier.blocks[0].nonlinear(columns), rtol=1e-4, atol=1e-5
    )


class Cosines(nn.Module):
    """Is the classifier as the trainer has it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def trained(ours):
    """Trains in a loop with the trainer's calls, and returns what it reports."""
    torch.manual_seed(0)
    embedding, classifier = nn.Linear(D, D), CosineClassifier(D, out_neurons=C)
    model = nn.Sequential(embedding, classifier if ours else Cosines(classifier.weight))
    state = copy.deepcopy(model.state_dict())
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    loss_fn = criterion("arc", 0.0)
    reported = []
    torch.manual_seed(1 + torch.distributed.get_rank())
    for step in range(6):
        x, y = torch.randn(N, D), torch.randint(C, (N,))
        loss_fn.update(margin=0.05 * step)
        output = model(x)
        loss = loss_fn(output, y) if ours else formula(output, y, 0.05 * step, 30.0, "arc")
        acc1 = accuracy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reported.append((loss.item(), acc1.item()))
    return reported, model.module.state_dict(), state


def both():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LazyCosine")
        return [trained(ours) for ours in (True, False)]


def test_the_loop_under_ddp_reports_the_same_and_ends_at_the_same_weights():
    for (ours, state, start), (theirs, other, other_start) in workers.run(2, both):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)
        assert list(state) == list(other) and start.keys() == other_start.keys()
        for name, value in state.items():
            assert torch.equal(start[name], other_start[name])  # a checkpoint of either side
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)
