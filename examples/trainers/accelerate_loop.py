# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with accelerate: gradient accumulation, clipping, and a plain or the fused head.

python examples/trainers/accelerate_loop.py
"""

import torch
from torch.utils.data import DataLoader

import compare
import heads
import marginkernels as mk

ACCUMULATED = 2


def train(ours: bool, run: compare.Run) -> None:
    """Trains a prepared backbone, and a head that is prepared with it."""
    from accelerate import Accelerator

    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    kind = heads.HEADS["fused" if ours else "torch"]
    head = kind(compare.EMBEDDING_SIZE, run.classes, margin=mk.CosFace(0.2), scale=30.0)
    model = torch.nn.ModuleDict({"backbone": run.backbone(), "head": head})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = model["head"](model["backbone"](images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
