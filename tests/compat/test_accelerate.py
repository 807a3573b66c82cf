# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with accelerate: a whole model, and split classes beside a prepared backbone."""

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import marginkernels as mk
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from tests.support import workers

accelerate = pytest.importorskip("accelerate", exc_type=ImportError)

C, D, INPUTS, ROWS, STEPS, MAX_NORM = 11, 6, 8, 12, 4, 5.0


def data():
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(STEPS * ROWS) % C
    x = torch.randn(C, INPUTS, generator=generator)[y]
    return x + 0.3 * torch.randn(x.shape, generator=generator), y


def backbone():
    torch.manual_seed(0)
    return nn.Linear(INPUTS, D)


def new_head(group=None):
    head = mk.MarginSoftmaxHead(D, C, margin=mk.ArcFace(0.3), scale=16.0, bias=True, sharding=group)
    rows = torch.randn(C, D, generator=torch.Generator().manual_seed(1))
    head.load_state_dict({"weight": rows, "bias": torch.zeros(C)})
    return head


def plain(parts, clips):
    """Trains in a plain loop and returns the mean loss of each step and the class weights."""
    network, head = backbone(), new_head()
    parameters = [*network.parameters(), *head.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.05), []
    for _ in range(2):
        for xs, ys in zip(*(t.split(ROWS * parts) for t in data()), strict=True):
            loss = head(network(xs), ys)
            loss.backward()
            if clips:
                nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, head.weight.detach()


class Whole(nn.Module):
    """Puts a backbone and a head into one model."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone(), new_head()

    def forward(self, x, y):
        return self.head(self.backbone(x), y)


@contextlib.contextmanager
def accelerator_here(precision="no", parts=1):
    """Makes an accelerator of this process, or of the group that it is in already."""
    environment = {}
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        environment = dict(WORLD_SIZE=size, RANK=rank, LOCAL_RANK=rank)
        environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with mock.patch.dict(os.environ, environment):
        yield accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts
        )
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


def train_whole(folder, precision, load):
    """Trains an epoch and saves the model; or loads that, and trains the second."""
    with accelerator_here(precision) as accelerator:
        model = Whole()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        loader = DataLoader(TensorDataset(*data()), ROWS // accelerator.num_processes)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if load:
            accelerator.load_state(folder)
        losses = []
        for x, y in loader:
            loss = model(x, y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if not load:
            accelerator.save_state(folder)
        return losses, accelerator.unwrap_model(model).head.weight.detach()


def close(first, second, expected, parts=1, tolerance=1e-4):
    """Compares the losses of two epochs, and the class weights after them."""
    losses = torch.tensor(first[0] + second[0]).view(-1, parts).mean(1)
    torch.testing.assert_close(losses, torch.tensor(expected[0]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(second[1], expected[1], rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 0.1)])
def test_a_whole_model_is_prepared_saved_and_loaded_as_any_other(precision, tolerance, tmp_path):
    expected = plain(1, clips=False)
    first, second = (train_whole(tmp_path / "one", precision, load) for load in (False, True))
    close(first, second, expected, tolerance=tolerance)
    of_ranks = [workers.run(2, train_whole, tmp_path / "two", precision, load) for load in (0, 1)]
    for first, second in zip(*of_ranks, strict=True):
        close(first, second, expected, tolerance=tolerance)


def train_in_part(folder, fused, parts, precision, load):
    """Trains an epoch with split classes and saves; or loads that, and trains the second."""
    with accelerator_here(precision, parts) as accelerator:
        network, head = backbone(), new_head(dist.group.WORLD)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
        kind = (
            mk.optim.AdamW(head, lr=0.05) if fused else torch.optim.AdamW(head.parameters(), 0.05)
        )
        return _epoch(accelerator, network, head, optimizer, kind, folder, fused, load)


def _epoch(accelerator, network, head, optimizer, head_optimizer, folder, fused, load):
    loader = DataLoader(TensorDataset(*data()), ROWS // 2)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: save_checkpoint(f"{folder}/head", head, head_optimizer)
    )
    accelerator.register_load_state_pre_hook(
        lambda models, folder: load_checkpoint(f"{folder}/head", head, head_optimizer)
    )
    if load:
        accelerator.load_state(folder)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(network):
            with accelerator.autocast():
                loss = head(network(x), y)
            waits = fused and not accelerator.sync_gradients
            with head_optimizer.accumulate() if waits else contextlib.nullcontext():
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), MAX_NORM)
                head_optimizer.step()
                head_optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if not load:
        accelerator.save_state(folder)
    return losses, head.full_state_dict()["weight"]


@pytest.mark.parametrize(
    "parts, precision, tolerance", [(1, "no", 1e-4), (2, "no", 1e-4), (1, "bf16", 0.1)]
)
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "inside backward"])
def test_split_classes_train_beside_a_prepared_backbone_and_resume(
    fused, parts, precision, tolerance, tmp_path
):
    arguments = (tmp_path / "state", fused, parts, precision)
    of_ranks = [workers.run(2, train_in_part, *arguments, load) for load in (False, True)]
    for first, second in zip(*of_ranks, strict=True):
        close(first, second, plain(parts, clips=True), parts, tolerance)
