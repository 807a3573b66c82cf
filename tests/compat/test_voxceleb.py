# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the losses of voxceleb_trainer and ESPnet with their formulas."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginkernels.compat.speaker import espnet, voxceleb

N, C, D = 40, 19, 8
F64 = torch.float64


def hard(c: Tensor, m: float) -> Tensor:
    theta = c.acos()
    return torch.where(theta < math.pi - m, torch.cos(theta + m), c - m * math.sin(m))


def easy(c: Tensor, m: float) -> Tensor:
    return torch.where(c > 0, torch.cos(c.acos() + m), c)


def with_margin(target: Callable, m: float = 0.3, scale: float = 15.0) -> Callable:
    """Returns the function of x and w (C, D) that makes the logits."""

    def logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        c = F.normalize(x) @ F.normalize(w).T
        return scale * torch.where(F.one_hot(y, C).bool(), target(c, m), c)

    return logits


TRAINER = dict(max_frames=200, nPerSpeaker=1)  # of its other settings, all of which come along
LOSSES = {
    "aamsoftmax": (voxceleb.AAMSoftmax, {}, with_margin(hard)),
    "easy": (voxceleb.AAMSoftmax, dict(easy_margin=True, margin=0.2), with_margin(easy, 0.2)),
    "amsoftmax": (voxceleb.AMSoftmax, dict(scale=30), with_margin(lambda c, m: c - m, 0.3, 30)),
}


def batch(w: Tensor, n: int = N) -> tuple[Tensor, Tensor]:
    """Returns rows from far beyond pi - m to close to their class; ``w`` is (C, D)."""
    y = torch.randint(C, (n,))
    lean = torch.linspace(-6, 6, n, dtype=F64)[:, None]
    x = torch.randn(n, D, dtype=F64) + lean * F.normalize(w.detach().cpu()[y])
    return x.to(w).requires_grad_(), y.to(w.device)


def percent(logits: Tensor, y: Tensor) -> Tensor:
    """Returns what the trainer's ``accuracy`` does."""
    right = logits.topk(1, 1, True, True)[1].t().eq(y.view(1, -1))
    return right.view(-1).float().sum(0, keepdim=True).mul_(100.0 / len(y))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_and_accuracy_are_the_trainers(name, device):
    torch.manual_seed(0)
    kind, settings, formula = LOSSES[name]
    loss_function = kind(nOut=D, nClasses=C, **settings, **TRAINER).double().to(device)
    assert loss_function.test_normalize
    (parameter,) = loss_function.parameters()
    w = parameter.T if name == "amsoftmax" else parameter
    seen = []
    for n in (N, 1):
        x, y = batch(w, n)
        loss, prec1 = loss_function.forward(x, y)
        logits = formula(x, w, y)
        expected = F.cross_entropy(logits, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (x, parameter)), torch.autograd.grad(expected, (x, parameter))
        )
        torch.testing.assert_close(prec1, percent(logits, y))
        assert loss_function(x, y[:, None])[1].equal(prec1)
        seen.append(prec1)
    assert 0 < seen[0] < 100


def test_plain_softmax_is_the_trainers(device):
    torch.manual_seed(0)
    loss_function = voxceleb.Softmax(nOut=D, nClasses=C, margin=0.3, **TRAINER).double().to(device)
    assert list(loss_function.state_dict()) == ["fc.weight", "fc.bias"]
    x, y = batch(loss_function.fc.weight)
    loss, prec1 = loss_function(x, y)
    logits = loss_function.fc(x)
    expected, leaves = F.cross_entropy(logits, y), (x, *loss_function.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    )
    torch.testing.assert_close(prec1, percent(logits, y))
    assert loss_function(x, y[:, None])[1].equal(prec1)


@pytest.mark.parametrize("name", LOSSES)
def test_names_shapes_and_first_values_are_the_trainers(name):
    kind, settings, _ = LOSSES[name]
    torch.manual_seed(4)
    state = kind(nOut=D, nClasses=C, **settings).state_dict()
    torch.manual_seed(4)
    if name == "amsoftmax":
        expected = dict(W=nn.init.xavier_normal_(torch.randn(D, C)))
    else:
        expected = dict(weight=nn.init.xavier_normal_(torch.empty(C, D)))
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


class SpeakerNet(nn.Module):
    """Calls network and loss as the trainer's SpeakerNet does, through its choice by name."""

    def __init__(self, loss_function: type[nn.Module], **settings: Any):
        super().__init__()
        self.__S__ = nn.Linear(5, D, dtype=F64)
        self.__L__ = loss_function(**settings)

    def forward(self, data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        out = self.__S__.forward(data.reshape(-1, data.size()[-1]))
        out = out.reshape(1, -1, out.size()[-1]).transpose(1, 0).squeeze(1)
        return self.__L__.forward(out, label)


class Plain(nn.Module):
    """Computes ``loss/aamsoftmax.py`` with all logits."""

    def __init__(self, nOut: int, nClasses: int, **_: Any):  # noqa: N803
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = with_margin(hard)(x, self.weight, label)
        return F.cross_entropy(logits, label), percent(logits.detach(), label)


def test_a_checkpoint_of_the_trainer_goes_on_training():
    """Trains two steps with all logits, and goes on from the checkpoint both ways."""
    torch.manual_seed(0)
    settings = dict(nOut=D, nClasses=C, **TRAINER)
    plain = SpeakerNet(Plain, **settings).double()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
    steps(plain, optimizer)
    ours = SpeakerNet(voxceleb.AAMSoftmax, **settings).double()
    ours.load_state_dict(plain.state_dict())
    optimizer_of_ours = torch.optim.Adam(ours.parameters(), lr=0.05)
    optimizer_of_ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(ours, optimizer_of_ours) == pytest.approx(steps(plain, optimizer), rel=1e-9)
    plain.load_state_dict(ours.state_dict())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(3):
        model.zero_grad()
        data = torch.randn(1, 16, 5, generator=generator, dtype=F64)
        label = torch.LongTensor(torch.randint(C, (16,), generator=generator))
        loss, prec1 = model(data, label)
        loss.backward()
        optimizer.step()
        seen += [loss.detach().cpu().item(), prec1.detach().cpu().item()]
    return seen


def continuous(c: Tensor, m: float) -> Tensor:
    theta = c.acos()
    return torch.where(theta < math.pi - m, torch.cos(theta + m), c - 1 - math.cos(math.pi - m))


ESPNETS = {
    "aamsoftmax": (espnet.AAMSoftmax, dict(no_such_setting=1), hard, 15),
    "aamsoftmax_sc_topk": (
        espnet.ArcMarginProduct_intertopk_subcenter, dict(margin=0.3), continuous, 32
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ESPNETS)
def test_espnets_losses_predict_without_the_margin(name, device):
    torch.manual_seed(0)
    kind, settings, target, scale = ESPNETS[name]
    head = kind(nout=D, nclasses=C, **settings).double().to(device)
    per_class, (w,) = len(head.weight) // C, head.parameters()
    for n, labels in ((N, lambda y: y), (N, lambda y: y[:, None]), (1, lambda y: y.squeeze())):
        x, y = batch(w[::per_class], n)
        loss, accuracy, predicted = head(x, labels(y))
        c = (F.normalize(x) @ F.normalize(w).T).unflatten(1, (C, -1)).amax(2)
        expected = F.cross_entropy(
            scale * torch.where(F.one_hot(y, C).bool(), target(c, 0.3), c), y
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))
        )
        assert torch.equal(predicted, c.argmax(1))
        assert accuracy == (predicted == y).float().mean()
        none, nor_this, unlabelled = head(x)
        assert none is nor_this is None and torch.equal(unlabelled, predicted)


def test_in_espnet_they_are_its_losses():
    base = pytest.importorskip("espnet2.spk.loss.abs_loss", exc_type=ImportError).AbsLoss
    for kind, *_ in ESPNETS.values():
        assert issubclass(kind, base)


def test_bad_settings_say_what_was_expected():
    for kind, name, value in (
        (voxceleb.AAMSoftmax, "margin", math.pi),
        (voxceleb.AMSoftmax, "margin", 2.5),
        (voxceleb.AAMSoftmax, "scale", 0),
        (voxceleb.AMSoftmax, "nClasses", 0),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected .*got {value}"):
            kind(**dict(dict(nOut=D, nClasses=C), **{name: value}))
