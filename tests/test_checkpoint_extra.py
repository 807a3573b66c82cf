# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Saves what a run has beside model and optimizer, and saves in the background."""

import threading
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from marginkernels.compat.insightface import CosFace, PartialFC_V2
from marginkernels.distributed import checkpoint
from marginkernels.distributed.checkpoint import (
    async_save_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from marginkernels.distributed.checkpoint.staging import staged
from marginkernels.optim import SGD
from tests.support import workers
from tests.test_checkpoint import D, make, run, state, step


def schedule(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)


def group():
    return dist.new_group(backend="gloo") if dist.is_initialized() else None


def differing(one, other):
    return [key for key in one if not torch.equal(*map(torch.as_tensor, (one[key], other[key])))]


def train_save_and_go_on(path, wrapper, background):
    """Compares a run that saved, and went on during the save, with one that loaded."""
    model, optimizer = make("adamw", 0, wrapper)
    rates, scaler = schedule(optimizer), torch.amp.GradScaler("cpu", enabled=False)
    for seed in range(3):
        step(model, optimizer, seed)
        rates.step()
    extra = dict(rates=rates, scaler=scaler, step=3, name="run", mean=torch.ones(2, 3))
    if background:
        pending = async_save_checkpoint(path, model, optimizer, extra=extra, process_group=group())
    else:
        save_checkpoint(path, model, optimizer, extra=extra)
    saved = state(model, optimizer)
    losses = [step(model, optimizer, seed) for seed in (3, 4)]
    if background:
        assert pending.result() is None
    model, optimizer = make("adamw", 9, wrapper)
    rates = schedule(optimizer)
    found = load_checkpoint(path, model, optimizer, extra=dict(rates=rates, scaler=scaler, new=1))
    assert differing(saved, state(model, optimizer)) == []
    assert [step(model, optimizer, seed) for seed in (3, 4)] == losses
    assert (rates.last_epoch, found["step"], found["name"], found["scaler"]) == (3, 3, "run", {})
    assert found["mean"].equal(torch.ones(2, 3)) and "new" not in found


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("world, wrapper", [(1, "DDP"), (2, "DDP"), (2, "FSDP2")])
def test_a_run_goes_on_with_scheduler_scaler_and_step(world, wrapper, background, tmp_path):
    run(world, train_save_and_go_on, tmp_path / "saved", wrapper, background)


def save_rows_of_insightface(path):
    """Covers a weight that is a plain tensor on each rank, moved by an optimizer of ours."""
    head = PartialFC_V2(CosFace(), D, 7)
    optimizer = SGD(head, lr=0.1, momentum=0.9)
    x, y = torch.randn(5, D), torch.arange(5)
    head(x, y).backward()
    optimizer.step()
    saved = head.weight.detach().clone(), optimizer.state[head.weight]["momentum_buffer"].clone()
    pending = async_save_checkpoint(path, head, optimizer, process_group=group())
    head(x, y).backward()
    optimizer.step()
    pending.result()
    load_checkpoint(path, head, optimizer)
    found = head.weight.detach(), optimizer.state[head.weight]["momentum_buffer"]
    assert all(map(torch.equal, saved, found))


@pytest.mark.parametrize("world", [1, 2])
def test_split_rows_are_copied_before_training_goes_on(world, tmp_path):
    run(world, save_rows_of_insightface, tmp_path / "saved")


def test_a_second_save_and_a_load_wait_for_the_first(tmp_path, monkeypatch):
    model, optimizer = make("sgd", 0)
    go, write = threading.Event(), checkpoint.write_state
    order = []

    def slow(folder, *args):
        if folder.name == "first":
            assert go.wait(30)
        write(folder, *args)
        order.append(folder.name)

    monkeypatch.setattr(checkpoint, "write_state", slow)
    pending = async_save_checkpoint(tmp_path / "first", model, optimizer)
    assert not (tmp_path / "first").exists()
    threading.Timer(0.2, go.set).start()
    save_checkpoint(tmp_path / "second", model, optimizer)
    assert order == ["first", "second"] and pending.done()
    with pytest.raises(FileExistsError):
        async_save_checkpoint(tmp_path / "first", model).result()
    load_checkpoint(tmp_path / "first", model, optimizer)


def save_without_a_group_of_its_own(path):
    model, _ = make("sgd", 0)
    for given in (None, dist.group.WORLD):
        with pytest.raises(ValueError, match="process_group: expected a group for saves alone"):
            async_save_checkpoint(path, model, process_group=given)


class Pair(NamedTuple):
    value: torch.Tensor
    name: str


def test_a_copy_has_the_types_of_the_state():
    state = {"pair": Pair(torch.ones(2), "a"), "list": [1, (2, torch.zeros(1))]}
    copied = staged(state)
    state["pair"].value.zero_()
    assert copied["pair"].value.equal(torch.ones(2)) and type(copied["pair"]) is Pair
    assert copied["list"] == [1, (2, torch.zeros(1))]


def test_warnings_filtered_during_a_background_save_stay_so(tmp_path):
    model, _ = make("sgd", 0)
    with warnings.catch_warnings():
        pending = async_save_checkpoint(tmp_path / "saved", model)
        warnings.filterwarnings("ignore", "a message")
        filters = list(warnings.filters)
        pending.result()
        assert warnings.filters == filters


def test_background_saves_want_a_group_of_their_own(tmp_path):
    workers.run(2, save_without_a_group_of_its_own, tmp_path / "saved")


class Odd:
    def state_dict(self):
        return {"function": print}


@pytest.mark.parametrize(
    "extra, error, match",
    [
        ([1], TypeError, "extra: expected a mapping by names, got list"),
        ({3: 1}, TypeError, "extra: expected strings as names, got 3"),
        ({"odd": Odd()}, ValueError, "extra: expected tensors, .* in 'odd', got Odd"),
    ],
)
def test_what_cannot_be_read_again_is_not_saved(extra, error, match, tmp_path):
    model, _ = make("sgd", 0)
    with pytest.raises(error, match=match):
        save_checkpoint(tmp_path / "saved", model, extra=extra)
    assert not list(tmp_path.iterdir())


def test_an_object_without_a_saved_state_changes_nothing(tmp_path):
    model, optimizer = make("sgd", 0)
    save_checkpoint(tmp_path / "saved", model, extra={"step": 2})
    before = state(model, optimizer)
    other, optimizer = make("sgd", 1)
    with pytest.raises(ValueError, match=r"extra: expected names .* \['step'\], got 'rates'"):
        load_checkpoint(tmp_path / "saved", other, extra={"rates": schedule(optimizer)})
    assert differing(before, state(other, optimizer))
    assert load_checkpoint(tmp_path / "saved", other) == {"step": 2}
