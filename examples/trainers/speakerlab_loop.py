# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains in a loop with the calls of 3D-Speaker's ``speakerlab/bin/train.py``.

3D-Speaker is not on PyPI: its classifier and loss are here as their formulas.

python examples/trainers/speakerlab_loop.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare
from marginkernels.compat.speaker import ArcMarginLoss, CosineClassifier


class Cosines(nn.Module):
    """Computes all cosines, as 3D-Speaker's classifier does."""

    def __init__(self, input_dim: int, out_neurons: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_neurons, input_dim)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C)."""
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Loss(nn.Module):
    """Computes 3D-Speaker's loss from all cosines."""

    def update(self, margin: float) -> None:
        """Sets the margin."""
        self.margin = margin

    def forward(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Computes the mean loss."""
        m = self.margin
        phi = cosine * math.cos(m) - (1 - cosine**2).sqrt() * math.sin(m)
        phi = torch.where(cosine > -math.cos(m), phi, cosine - 1 + math.cos(m))
        one_hot = torch.zeros_like(cosine).scatter_(1, label.unsqueeze(1), 1)
        return F.cross_entropy(32 * (one_hot * phi + (1 - one_hot) * cosine), label)


def accuracy(output: Tensor, label: Tensor) -> Tensor:
    """Returns the accuracy in percent, from the cosines."""
    _, nearest = output.topk(1)
    return 100 * nearest.squeeze(-1).eq(label).float().mean()


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the formulas, or with the classes that a configuration may name instead."""
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    classifier = (CosineClassifier if ours else Cosines)(
        compare.EMBEDDING_SIZE, out_neurons=run.classes
    )
    model = nn.Sequential(run.backbone(), classifier)
    criterion = ArcMarginLoss(scale=32.0) if ours else Loss()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    model.train()
    for x, y in loader:
        criterion.update(margin=0.2)
        output = model(x)
        loss = criterion(output, y)
        accuracy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
