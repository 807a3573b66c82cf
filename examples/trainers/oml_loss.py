# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with the ArcFace loss of open-metric-learning in the loop of its tutorials.

python examples/trainers/oml_loss.py
"""

import torch
from torch.utils.data import DataLoader

import compare


def train(ours: bool, run: compare.Run) -> None:
    """Trains with OML's criterion, or with the fused one of the same name."""
    if ours:
        from marginkernels.compat.oml import ArcFaceLoss
    else:
        from oml.losses.arcface import ArcFaceLoss  # type: ignore[no-redef]

    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    extractor = run.backbone().train()
    criterion = ArcFaceLoss(compare.EMBEDDING_SIZE, run.classes, m=0.3, s=30, smoothing_epsilon=0.1)
    parameters = [*extractor.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for images, labels in loader:
        loss = criterion(extractor(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
