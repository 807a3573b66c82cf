# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the head's optimizers with torch.optim's on the gradients of a plain head."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginkernels.optim
from marginkernels import (
    ArcFace,
    CosFace,
    CurricularFace,
    MarginSoftmaxHead,
    MVSoftmax,
    NSoftmax,
    PartialFC,
)
from marginkernels.backends import reasons
from marginkernels.rules import RULES
from marginkernels.testing import assert_within_budget
from tests.support.losses import LOSSES, operands
from tests.support.losses import C as LOSS_CLASSES
from tests.support.small import C, D, batch, make_head
from tests.support.updates import skip_without_updates

STEPS = 4
ARCFACE = dict(margin=ArcFace(0.3), scale=16.0)
HEADS: dict[str, Callable[[], dict[str, Any]]] = {
    "ArcFace": lambda: ARCFACE,
    "bias and label smoothing": lambda: ARCFACE | dict(bias=True, label_smoothing=0.1),
    "no normalisation": lambda: dict(margin=NSoftmax(), scale=1.0, normalize="none", bias=True),
    "normalised weights": lambda: dict(margin=CosFace(0.1), scale=2.0, normalize="weight"),
    "CurricularFace": lambda: dict(margin=CurricularFace(0.3), scale=16.0),
    "MV-Softmax": lambda: dict(margin=MVSoftmax(0.3), scale=16.0),
    "learnable scale": lambda: dict(margin=ArcFace(0.3), scale=nn.Parameter(torch.tensor(16.0))),
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", dict(lr=0.1)),
    "momentum": ("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
    "dampening": ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3)),
    "nesterov": ("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)),
    "AdamW": ("AdamW", dict(lr=1e-2)),
    "AdamW, settings": ("AdamW", dict(lr=0.1, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3)),
}


class RowwiseAdagrad(torch.optim.Optimizer):
    """Takes FBGEMM's steps on whole gradients, class by class."""

    def __init__(self, params: list[Tensor], lr: float, eps: float, weight_decay: float):
        super().__init__(params, dict(lr=lr, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for p in group["params"]:
            total = self.state[p].setdefault("sum", torch.zeros(len(p), dtype=p.dtype))
            for j in range(len(p)):
                g = p.grad[j] + group["weight_decay"] * p[j]
                total[j] += g.square().mean()
                p[j] -= group["lr"] / (total[j].sqrt() + group["eps"]) * g


def trained(
    head: MarginSoftmaxHead, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> list[Tensor]:
    """Trains some steps, with other settings in each, and returns all that has moved."""
    torch.manual_seed(3)
    backbone = nn.Linear(6, D, dtype=torch.float64).to(dtype)
    others = [p for name, p in head.named_parameters() if name not in ("weight", "bias")]
    rest = torch.optim.SGD([*backbone.parameters(), *others], lr=0.01)
    group, seen = optimizer.param_groups[0], []
    for step in range(STEPS):
        group["lr"] *= 0.7
        if group.get("momentum"):
            group["momentum"] = 0.5 + 0.1 * step
        inputs = torch.randn(12, 6, dtype=torch.float64).to(dtype)
        loss = head(backbone(inputs), torch.randint(0, C, (12,)))
        for each in (rest, optimizer):
            each.zero_grad()
        loss.backward()
        for each in (rest, optimizer):
            each.step()
        seen += [p.detach().clone() for p in (*head.parameters(), *backbone.parameters())]
    assert (head.weight.grad is None) == isinstance(optimizer, marginkernels.optim.HeadOptimizer)
    return seen


def heads(name: str, backend: str, dtype: torch.dtype) -> list[MarginSoftmaxHead]:
    """Returns the same head twice."""
    torch.manual_seed(1)
    head = MarginSoftmaxHead(D, C, backend=backend, dtype=torch.float64, **HEADS[name]())
    head = head.to(dtype)
    return [head, copy.deepcopy(head)]


def both(
    head: str, optimizer: str, backend: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Trains with the optimizer inside backward, and with that of torch."""
    kind, settings = OPTIMIZERS[optimizer]
    fused, plain = heads(head, backend, dtype)
    held = [p for p in (plain.weight, plain.bias) if p is not None]
    return (
        trained(fused, getattr(marginkernels.optim, kind)(fused, **settings), dtype),
        trained(plain, getattr(torch.optim, kind)(held, **settings), dtype),
    )


CASES = [(head, "nesterov") for head in HEADS] + [
    ("bias and label smoothing", o) for o in OPTIMIZERS
]


@pytest.mark.parametrize(("head", "optimizer"), CASES)
def test_steps_are_those_of_torch_in_fp64(head, optimizer):
    fused, plain = both(head, optimizer, "reference", torch.float64)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("head", "optimizer"), CASES)
def test_steps_are_as_exact_as_those_of_torch_in_fp32(head, optimizer, backend):
    skip_without_updates(backend)
    _, exact = both(head, optimizer, "reference", torch.float64)
    fused, plain = both(head, optimizer, backend, torch.float32)
    for number, of_each in enumerate(zip(fused, plain, exact, strict=True)):
        a, b, e = (t.reshape(1, -1) for t in of_each)
        assert_within_budget(f"tensor {number}", a, [b], e, conditioning=8)


@pytest.mark.parametrize("head", ["ArcFace", "bias and label smoothing"])
def test_rowwise_adagrad_is_fbgemm_s(head):
    settings = dict(lr=0.1, eps=1e-3, weight_decay=0.1)
    fused, plain = heads(head, "reference", torch.float64)
    held = [p for p in (plain.weight, plain.bias) if p is not None]
    a = trained(fused, marginkernels.optim.RowwiseAdagrad(fused, **settings), torch.float64)
    b = trained(plain, RowwiseAdagrad(held, **settings), torch.float64)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_moves_the_weights_by_its_gradient(name, backend):
    skip_without_updates(backend)
    loss, (x, w, y) = LOSSES[name], operands(dtype=torch.float32)
    head = MarginSoftmaxHead(
        x.shape[1], LOSS_CLASSES, margin=loss.make(), scale=loss.scale, normalize=loss.normalize,
        backend=backend, **loss.accepted(z_loss=1e-2, label_smoothing=0.1),
    )  # fmt: skip
    with torch.no_grad():
        head.weight.copy_(w)
    plain, features = copy.deepcopy(head), [x.clone().requires_grad_() for _ in range(2)]
    head_optimizer = marginkernels.optim.SGD(head, lr=0.5)
    for each, leaf in zip((head, plain), features, strict=True):
        each(leaf, y).backward()
    head_optimizer.step()
    torch.testing.assert_close(head.weight.detach(), w - 0.5 * plain.weight.grad)
    assert (w != head.weight).any(1).all()
    torch.testing.assert_close(features[0].grad, features[1].grad)


@pytest.mark.parametrize("save_tiles", [True, False])
def test_saved_tiles_change_nothing(save_tiles, backend):
    skip_without_updates(backend)
    if backend == "reference":
        pytest.skip("it keeps no tiles")
    results = []
    for tiles in (save_tiles, "auto"):
        head, _ = heads("ArcFace", backend, torch.float32)
        head.save_tiles = tiles
        results.append(trained(head, marginkernels.optim.SGD(head, momentum=0.9), torch.float32))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_frozen_backbone_does_not_hold_the_weights_up(backend, device):
    skip_without_updates(backend)
    head, plain = heads("ArcFace", backend, torch.float32)
    head_optimizer = marginkernels.optim.SGD(head, lr=0.1)
    x, y = batch("cpu")
    head(x, y).backward()
    head_optimizer.step()
    plain(x, y).backward()
    torch.testing.assert_close(head.weight, plain.weight - 0.1 * plain.weight.grad)


def test_frozen_weights_stay_while_the_rest_trains():
    head, plain = heads("bias and label smoothing", "reference", torch.float64)
    head.weight.requires_grad_(False)
    before = head.weight.clone()
    head_optimizer = marginkernels.optim.SGD(head, lr=0.1)
    x, y = batch("cpu", dtype=torch.float64)
    x.requires_grad_()
    head(x, y).backward()
    head_optimizer.step()
    dx = torch.autograd.grad(plain(x, y), (x, plain.bias))
    assert torch.equal(head.weight, before)
    torch.testing.assert_close(x.grad, dx[0])
    torch.testing.assert_close(head.bias, -0.1 * dx[1])


def test_all_biases_move_where_the_weight_freezes_after_a_sampled_step():
    head = make_head("reference", "cpu", margin=NSoftmax(), bias=True, sampling=PartialFC(0.3))
    head_optimizer = marginkernels.optim.SGD(head, lr=0.1)
    for frozen in (False, True):
        head.weight.requires_grad_(not frozen)
        before = head.bias.detach().clone()
        head(*batch("cpu")).backward()
        dbias = head.bias.grad.clone()
        head_optimizer.step()
    torch.testing.assert_close(head.bias, before - 0.1 * dbias)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RowwiseAdagrad"])
def test_a_restart_goes_on_with_the_same_bits(kind, backend):
    """Saves after two of four steps, with all in bf16, which is rounded at random."""
    skip_without_updates(backend)
    if why_not := reasons(backend, "cpu", torch.float32):
        pytest.skip("; ".join(why_not))

    def make() -> tuple[MarginSoftmaxHead, torch.optim.Optimizer]:
        head = MarginSoftmaxHead(
            D, C, margin=ArcFace(0.3), scale=16.0, bias=True, backend=backend, dtype=torch.bfloat16
        )
        more = dict(momentum=0.9) if kind == "SGD" else {}
        return head, getattr(marginkernels.optim, kind)(head, lr=0.1, **more)

    def steps(head: MarginSoftmaxHead, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            x, y = batch("cpu")
            head(x, y).backward()
            optimizer.step()

    head, optimizer = make()
    steps(head, optimizer, range(2))
    saved = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    steps(head, optimizer, range(2, 4))
    again, other = make()
    tensors = list(other.state[again.weight].values())
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert all(a is b for a, b in zip(tensors, other.state[again.weight].values(), strict=True))
    steps(again, other, range(2, 4))
    for a, b in zip(head.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.bfloat16
    for p, q in zip(head.parameters(), again.parameters(), strict=True):
        for name in (part.name for part in RULES[optimizer.rule].state):
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


def test_the_bits_do_not_depend_on_the_number_of_threads(backend, device):
    skip_without_updates(backend)
    torch.manual_seed(0)
    x, y = torch.randn(40, 37), torch.randint(3000, (40,))
    first = MarginSoftmaxHead(37, 3000, **ARCFACE, backend=backend, dtype=torch.bfloat16)
    threads, moved = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(1)  # of the rounding
            head = copy.deepcopy(first)
            head_optimizer = marginkernels.optim.AdamW(head)
            for _ in range(2):
                head(x, y).backward()
                head_optimizer.step()
            moved.append([head.weight, *head_optimizer.state[head.weight].values()])
    finally:
        torch.set_num_threads(threads)
    for other in moved[1:]:
        assert all(map(torch.equal, moved[0], other))


def test_a_step_below_half_a_unit_of_bf16_still_moves_the_weights_on_average(backend, device):
    skip_without_updates(backend)
    head = MarginSoftmaxHead(
        64, 2000, margin=NSoftmax(), scale=1.0, backend=backend, dtype=torch.bfloat16
    )
    torch.nn.init.ones_(head.weight)
    head_optimizer = marginkernels.optim.SGD(head, lr=1.0, weight_decay=2.0**-12)
    x, y = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)  # no gradient, the decay alone
    for _ in range(8):
        head(x, y).backward()
        head_optimizer.step()
    moved = 1 - head.weight.detach().double()
    exact = 1 - (1 - 2.0**-12) ** 8
    assert abs(moved.mean() - exact) < 4.5 * moved.std() / moved.numel() ** 0.5
    assert 0.3 < (moved != 0).double().mean() < 0.6  # of steps of 1 / 256


def test_projected_rows_have_unit_norm_and_the_norms_are_known():
    head, _ = heads("ArcFace", "reference", torch.float64)
    head_optimizer = marginkernels.optim.SGD(head, lr=0.5, momentum=0.9, project=True)
    x, y = batch("cpu", dtype=torch.float64)
    head(x, y).backward()
    head_optimizer.step()
    ones = torch.ones(C, dtype=torch.float64)
    torch.testing.assert_close(head.weight.norm(dim=1), ones)
    known = head_optimizer.update.known_norms(head.weight, torch.float64)
    torch.testing.assert_close(known, ones)


def test_a_bound_on_the_norm_of_each_row_s_gradient():
    head, plain = heads("ArcFace", "reference", torch.float64)
    before = head.weight.detach().clone()
    x, y = batch("cpu", dtype=torch.float64)
    plain(x, y).backward()
    norms = plain.weight.grad.norm(dim=1, keepdim=True)
    bound = float(norms.median())
    head_optimizer = marginkernels.optim.SGD(head, lr=1.0, clip_row_norm=bound)
    head(x, y).backward()
    head_optimizer.step()
    expected = plain.weight.grad * (bound / norms).clamp_max(1)
    torch.testing.assert_close(before - head.weight, expected)
