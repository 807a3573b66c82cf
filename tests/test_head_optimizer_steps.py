# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests steps of the head's optimizers that are skipped, accumulated, interrupted or captured."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import marginkernels
from marginkernels import (
    AdaCos,
    AirFace,
    ArcFace,
    CurricularFace,
    MarginSoftmaxHead,
    NSoftmax,
    PartialFC,
    device_checks,
    rules,
)
from marginkernels.backends import reference
from marginkernels.optim import SGD, AdamW
from tests.support.attached import all_of, attached, take_step
from tests.support.small import C, D, batch, make_head
from tests.support.updates import skip_without_updates
from tests.test_device import RefuseWaits

SCALERS = [torch.amp.GradScaler, marginkernels.GradScaler]


def scaled_steps(kind, fused, bias, *, unscale=False, frozen=False):
    """Takes steps of which the second overflows, and returns weights, scales and the scaler.

    The backbone has an optimizer of its own in the same scaler, unless it is frozen.
    """
    torch.manual_seed(0)
    scaler = kind("cpu", init_scale=2.0**10, growth_interval=2)
    head = make_head("reference", "cpu", bias=bias, dtype=torch.float64)
    held = [p for p in (head.weight, head.bias) if p is not None]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    make = (
        functools.partial(SGD, head, scaler=scaler)
        if fused
        else (functools.partial(torch.optim.SGD, held))
    )
    optimizer = make(**settings)
    torch.manual_seed(1)
    backbone = nn.Linear(D, D, dtype=torch.float64)
    rest = torch.optim.SGD(backbone.parameters(), lr=0.01)
    seen = []
    for step in range(5):
        x, y = batch("cpu", dtype=torch.float64)
        features = x if frozen else backbone(x)
        loss = scaler.scale(head(features, y)) * (torch.inf if step == 1 else 1.0)
        loss.backward()
        if unscale:
            scaler.unscale_(optimizer)
        for each in (optimizer, *([] if frozen else [rest])):
            scaler.step(each)
            each.zero_grad()
        scaler.update()
        seen += [p.detach().clone() for p in (*held, *backbone.parameters())]
        seen.append(torch.tensor(scaler.get_scale()))
    return seen


@pytest.mark.parametrize("kind", SCALERS, ids=["torch", "marginkernels"])
@pytest.mark.parametrize("more", [{}, dict(unscale=True), dict(frozen=True)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_scaled_step_is_that_of_torch_and_skipped_as_a_whole(kind, more, bias):
    if more and kind is not torch.amp.GradScaler:
        pytest.skip("the same")
    fused = scaled_steps(kind, True, bias, **more)
    for a, b in zip(fused, scaled_steps(kind, False, bias, **more), strict=True):
        torch.testing.assert_close(a, b)


def test_the_head_alone_tells_the_scaler_of_an_overflow():
    """Steps the head alone, whose optimizer GradScaler.step does not see."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    head, optimizer = attached(scaler=scaler)
    x, y = batch("cpu")
    before = all_of(head, optimizer)
    (scaler.scale(head(x, y)) * torch.nan).backward()
    optimizer.step()
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(map(torch.equal, before, all_of(head, optimizer)))  # the count of steps too


def test_a_scaler_that_is_off_or_unknown():
    head, optimizer = attached(scaler=torch.amp.GradScaler("cpu", enabled=False))
    other, plain = copy.deepcopy(head), None
    plain = SGD(other, lr=0.1, momentum=0.9)
    take_step(head, optimizer)
    take_step(other, plain)
    assert torch.equal(head.weight, other.weight)

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(head(*batch("cpu"))).backward()
    with pytest.raises(RuntimeError, match=r"^scaler: expected the GradScaler that takes"):
        scaler.step(plain)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RowwiseAdagrad"])
def test_nothing_waits_for_the_device(kind, monkeypatch):
    monkeypatch.setattr(device_checks, "checks_values", lambda device: False)  # as on a GPU
    scaler = torch.amp.GradScaler("cpu")
    more = dict(momentum=0.9, dampening=0.5) if kind == "SGD" else {}
    for sampling in (None, PartialFC(0.5)):
        head = make_head("reference", "cpu", bias=True, sampling=sampling)
        optimizer = getattr(marginkernels.optim, kind)(
            head, lr=torch.tensor(0.1), scaler=scaler, clip_row_norm=1.0, project=True, **more
        )
        x, y = batch("cpu")
        x.requires_grad_()
        for _ in range(2):
            with RefuseWaits():
                scaler.scale(head(x, y)).backward()
                scaler.step(optimizer)
                scaler.update()


HEADS = {
    "ArcFace": lambda: dict(margin=ArcFace(0.3), scale=16.0),
    "bias": lambda: dict(margin=ArcFace(0.3), scale=16.0, bias=True, label_smoothing=0.1),
    "learnable": lambda: dict(margin=ArcFace(0.3), scale=nn.Parameter(torch.tensor(16.0))),
    "CurricularFace, eval": lambda: dict(margin=CurricularFace(0.3).eval(), scale=16.0),
    "no normalisation": lambda: dict(margin=NSoftmax(), scale=1.0, normalize="none"),
}


@pytest.mark.parametrize("name", HEADS)
def test_accumulated_batches_are_one_large_batch(name, backend, device):
    skip_without_updates(backend)
    torch.manual_seed(0)
    head = MarginSoftmaxHead(D, C, backend=backend, reduction="sum", **HEADS[name]())
    large = copy.deepcopy(head)
    optimizer, its = (AdamW(each, lr=0.01) for each in (head, large))
    for _ in range(2):
        parts = [batch("cpu", n) for n in (12, 1, 0, 7)]
        x, y = (torch.cat(t) for t in zip(*parts, strict=True))
        x.requires_grad_()
        rows = x.detach().clone().requires_grad_()
        large(x, y).backward()
        its.step()
        pieces = list(zip(rows.split([12, 1, 0, 7]), y.split([12, 1, 0, 7]), strict=True))
        before = head.weight.detach().clone()
        with optimizer.accumulate():
            for piece in pieces[:-1]:
                head(*piece).backward()
        assert torch.equal(head.weight, before)
        head(*pieces[-1]).backward()
        optimizer.step()
        torch.testing.assert_close(rows.grad, x.grad, rtol=1e-4, atol=1e-6)
    for (key, a), b in zip(head.named_parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)
        assert key in ("weight", "bias") or a.grad is not None


def test_what_is_kept_are_numbers_for_each_row():
    head, optimizer = attached()
    with optimizer.accumulate():
        head(*batch("cpu", 100)).backward()
    kept = [t for t in optimizer.update._kept[0] if t is not None]
    assert sum(t.numel() for t in kept) <= 100 * (D + 6)
    assert all(t.untyped_storage().nbytes() <= t.nbytes for t in kept)


MOVING = {
    "CurricularFace": lambda: dict(margin=CurricularFace(0.3)),
    "AdaCos": lambda: dict(margin=NSoftmax(), scale=AdaCos(C)),
}


@pytest.mark.parametrize("name", MOVING)
def test_batches_that_a_state_moves_between_are_refused(name):
    head = make_head("reference", "cpu", **MOVING[name]())
    optimizer = SGD(head)
    with optimizer.accumulate():
        head(*batch("cpu")).backward()
        with pytest.raises(RuntimeError, match=r"^accumulate: expected the same scale.*eval mode"):
            head(*batch("cpu")).backward()
    optimizer = SGD(make_head("reference", "cpu", sampling=PartialFC(0.5)))
    with (
        optimizer.accumulate(),
        pytest.raises(RuntimeError, match=r"^accumulate: expected all classes"),
    ):
        optimizer.update.head(*batch("cpu")).backward()


def test_batches_of_margins_with_other_negatives_are_refused():
    head = make_head("reference", "cpu", margin=AirFace(0.3))
    optimizer = SGD(head)
    with optimizer.accumulate():
        head(*batch("cpu")).backward()
    head.margin = ArcFace(0.3)
    with pytest.raises(RuntimeError, match=r"^accumulate: expected the same scale and"):
        head(*batch("cpu")).backward()


def test_a_step_while_batches_wait_and_a_weight_that_changes_between_them():
    head, optimizer = attached()
    before = all_of(head, optimizer)
    with optimizer.accumulate():
        head(*batch("cpu")).backward()
        with pytest.raises(RuntimeError, match=r"^step: expected .* outside of accumulate"):
            optimizer.step()
    with pytest.raises(ZeroDivisionError), optimizer.accumulate():
        1 / 0  # noqa: B018
    assert not optimizer.update.accumulates
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    nn.init.normal_(head.weight)
    with pytest.raises(RuntimeError, match=r"^accumulate: expected the class weights as they were"):
        head(*batch("cpu")).backward()
    take_step(head, optimizer)


def test_an_interrupted_step_says_so_until_all_is_loaded(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(reference, "BLOCK_CLASSES", 20)
    head, optimizer = attached()
    take_step(head, optimizer)
    saved = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    applied, calls = rules.applied, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("planted")
        return applied(*args)

    before = all_of(head, optimizer)
    monkeypatch.setattr(rules, "applied", interrupted)
    with pytest.raises(MemoryError):
        head(*batch("cpu")).backward()
    monkeypatch.setattr(rules, "applied", applied)
    after = all_of(head, optimizer)
    assert not torch.equal(before[0][:20], after[0][:20])
    assert torch.equal(before[0][20:], after[0][20:])

    uses = [lambda: head(*batch("cpu")), optimizer.step]
    for load in (lambda: optimizer.load_state_dict(saved[1]), lambda: None):
        for use in uses:
            with pytest.raises(RuntimeError, match=r"interrupted.*MemoryError: planted.*Load"):
                use()
        load()
    head.load_state_dict(saved[0])
    take_step(head, optimizer)


class Failing(nn.Module):
    """Fails in backward."""

    def forward(self, c, rows):
        c.register_hook(self.fail)
        return c * 1.0

    def fail(self, gradient):
        raise ValueError("planted")


def test_a_failure_before_the_first_write_leaves_all_as_it_was():
    head, optimizer = attached()
    take_step(head, optimizer)
    margin, head.margin = head.margin, Failing()
    before = all_of(head, optimizer)
    with pytest.raises(ValueError, match="planted"):
        head(*batch("cpu")[:2]).backward()
    assert all(map(torch.equal, before, all_of(head, optimizer)))
    head.margin = margin
    take_step(head, optimizer)


def test_a_cuda_graph_does_not_repeat_one_step(monkeypatch):
    _, optimizer = attached()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.update.open()
    monkeypatch.setattr(optimizer.update, "check", lambda w: None)
    monkeypatch.setattr(optimizer.update, "weight", lambda: SimpleNamespace(is_cuda=True))
    with pytest.raises(RuntimeError, match=r"^head: expected no capture of a CUDA graph.*backbone"):
        optimizer.update.open()
