# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with Lightning: a plain head and one optimizer, or the fused head, stepped in backward.

python examples/trainers/lightning_loop.py
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import compare
import heads
import marginkernels as mk
from marginkernels.optim import AdamW


class Recognizer(pl.LightningModule):
    """Has a backbone, a head and an optimizer for each, whose states Lightning saves."""

    def __init__(self, ours: bool, run: compare.Run):
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.log_loss = run.backbone(), run.log
        kind = heads.HEADS["fused" if ours else "torch"]
        self.head = kind(compare.EMBEDDING_SIZE, run.classes, margin=mk.CosFace(0.2), scale=30.0)
        self.ours = ours

    def configure_optimizers(self) -> Any:
        """Makes one optimizer of torch, and one that moves the class weights inside backward."""
        optimizer = torch.optim.AdamW(self.backbone.parameters(), lr=1e-3)
        if self.ours:
            return optimizer, AdamW(self.head, lr=1e-3)
        return optimizer, torch.optim.AdamW(self.head.parameters(), lr=1e-3)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Takes a step of both optimizers."""
        images, labels = batch
        optimizer, head_optimizer = self.optimizers()
        loss = self.head(self.backbone(images), labels)
        self.manual_backward(loss)
        optimizer.step()
        head_optimizer.step()
        optimizer.zero_grad()
        head_optimizer.zero_grad()
        self.log_loss(loss)


def train(ours: bool, run: compare.Run) -> None:
    """Trains one epoch."""
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Recognizer(ours, run), loader)


if __name__ == "__main__":
    compare.main(train)
