# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with Lightning, in one process and with split classes, by torch's optimizers and ours."""

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import marginkernels as mk
from marginkernels.arguments import is_dtensor
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from tests.support import workers

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
ModelCheckpoint = lightning.callbacks.ModelCheckpoint

C, D, INPUTS, ROWS = 11, 6, 8, 12  # 11 classes are 6 and 5 on two ranks


class Module(lightning.LightningModule):
    """Has a head that configure_model makes, and one optimizer of torch for everything."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(INPUTS, D)
        self.head = None
        self.losses = []

    def configure_model(self):
        if self.head is None:
            self.head = mk.MarginSoftmaxHead(
                D, C, margin=mk.ArcFace(0.3), scale=16.0, bias=True, sharding=dist.group.WORLD
            )
            rows = torch.randn(C, D, generator=torch.Generator().manual_seed(1))
            zeros = torch.zeros(C)
            self.head.load_state_dict({"weight": rows, "bias": zeros})

    def training_step(self, batch, _):
        loss = self.head(self.backbone(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        if gradient_clip_val is not None:
            mk.clip_grad_norm_(self.parameters(), gradient_clip_val)


class ManualModule(Module):
    """Steps the backbone's optimizer, and one that moves the head inside backward."""

    def __init__(self, optimizer=mk.optim.AdamW, parts=1):
        super().__init__()
        self.automatic_optimization = False
        self.optimizer, self.parts = optimizer, parts
        self.head_optimizer = None

    def configure_optimizers(self):
        if self.head_optimizer is not None:
            self.head_optimizer.detach()
        self.head_optimizer = self.optimizer(self.head, lr=0.05)
        return torch.optim.AdamW(self.backbone.parameters(), lr=0.05), self.head_optimizer

    def training_step(self, batch, index):
        optimizer, head_optimizer = self.optimizers()
        loss = super().training_step(batch, index)
        ends = (index + 1) % self.parts == 0
        with contextlib.nullcontext() if ends else head_optimizer.accumulate():
            self.manual_backward(loss / self.parts)
        if ends:
            optimizer.step()
            head_optimizer.step()
            optimizer.zero_grad()


class TorchManual(ManualModule):
    """Does the same with torch's optimizers alone."""

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(module.parameters(), lr=0.05) for module in (self.backbone, self.head)
        ]

    def training_step(self, batch, index):
        loss = Module.training_step(self, batch, index)
        self.manual_backward(loss / self.parts)
        if (index + 1) % self.parts == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


def fit(module, epochs=1, strategy="auto", devices=1, folder=None, resume=None, **settings):
    """Trains and returns the losses of all steps, and the state of the module with all classes."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(4 * ROWS) % C
    x = torch.randn(C, INPUTS, generator=generator)[y]
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    callbacks = [] if folder is None else [ModelCheckpoint(folder, save_last=True)]
    trainer = lightning.Trainer(
        max_epochs=epochs, strategy=strategy, devices=devices, accelerator="cpu", logger=False,
        callbacks=callbacks, enable_checkpointing=bool(callbacks), enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **settings,
    )  # fmt: skip
    data, sampler = TensorDataset(x, y), None
    if devices > 1:  # Lightning's own would shuffle
        sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, ROWS // devices, sampler=sampler)
    trainer.fit(module, loader, ckpt_path=resume and resume / "last.ckpt")
    named = module.state_dict().items()
    return module.losses, {k: v.full_tensor() if is_dtensor(v) else v.clone() for k, v in named}


def close(results, expected):
    """Compares the losses of the last steps, and the state after them."""
    losses = expected[0][-len(results[0]) :]
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], expected[1], rtol=1e-4, atol=1e-4)


def test_a_module_trains_and_resumes_with_its_optimizer(tmp_path):
    whole = fit(Module(), 2)
    assert len(whole[0]) == 8 and whole[0][-1] < whole[0][0]
    fit(Module(), 1, folder=tmp_path)
    close(fit(Module(), 2, resume=tmp_path), whole)


def test_bf16_accumulation_and_clipping_are_those_of_the_trainer():
    settings = dict(accumulate_grad_batches=2, gradient_clip_val=1.0)
    losses, _ = fit(Module(), precision="bf16-mixed", **settings)
    exact, _ = fit(Module(), **settings)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=0.05, atol=0)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_optimizer_inside_backward_takes_the_steps_of_torch_and_resumes(parts, tmp_path):
    expected = fit(TorchManual(parts=parts), 2)
    close(fit(ManualModule(parts=parts), 2), expected)
    module = ManualModule(parts=parts)
    fit(module, 1, folder=tmp_path)
    module.losses = []
    for again in (ManualModule(parts=parts), module):  # a module may be fitted again
        close(fit(again, 2, resume=tmp_path), expected)


def fit_in_part(make, arguments):
    """Trains on each of two ranks, which are there already."""
    from marginkernels.compat.lightning import SplitHeadStrategy

    rank = str(dist.get_rank())
    environment = dict(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, NODE_RANK="0")
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with mock.patch.dict(os.environ, environment):
        return fit(make(), strategy=SplitHeadStrategy(), devices=2, **arguments)


@pytest.mark.parametrize("kind", [Module, ManualModule])
def test_split_classes_take_the_steps_of_one_process_and_resume_on_either(kind, tmp_path):
    plain = TorchManual if kind is ManualModule else Module
    settings = dict(gradient_clip_val=5.0) if kind is Module else {}
    expected = fit(plain(), 2, **settings)
    for result in workers.run(2, fit_in_part, kind, dict(epochs=2, **settings)):
        close(result, expected)
    folders = tmp_path / "split", tmp_path / "whole"
    workers.run(2, fit_in_part, kind, dict(epochs=1, folder=folders[0], **settings))
    weight = kind.load_from_checkpoint(folders[0] / "last.ckpt").head.weight
    torch.testing.assert_close(
        weight,
        fit(kind(), 1, folder=folders[1], **settings)[1]["head.weight"],
        rtol=1e-4,
        atol=1e-4,
    )
    for folder in folders:
        again = dict(epochs=2, resume=folder, **settings)
        for result in workers.run(2, fit_in_part, kind, again):
            close(result, expected)
        close(fit(kind(), **again), expected)


class PlainShards(Module):
    """Has a head whose classes are plain tensors."""

    def configure_model(self):
        self.head = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.0, 0.4), D, C)


def test_a_head_whose_classes_lightning_cannot_gather_is_refused():
    with pytest.raises(RuntimeError, match=r"head.weight: expected a DTensor.* got Parameter"):
        workers.run(2, fit_in_part, PlainShards, {})
