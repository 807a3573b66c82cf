# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains: the loop that the demo, the study and the gallery share."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import model

# the class weights turn fast enough only with a larger step than the backbone can take
BACKBONE_RATE, CRITERION_RATE = 0.01, 0.1
MAX_GRADIENT_NORM = 5.0
WARM_UP = 100  # steps, at most a tenth of all


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the learning rates: a short linear warm-up, then half a cosine to 0."""
    warm_up = min(WARM_UP, steps // 10)
    return min(1, (step + 1) / (warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    backbone: nn.Module,
    criterion: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    backbone_rate: float = BACKBONE_RATE,
) -> Iterator[float]:
    """Trains both and yields the loss after each step; ``criterion(embeddings, labels) -> loss``.

    Args:
        batches: (inputs, labels), ``steps`` of them.
        backbone_rate: the greatest learning rate of the backbone.
    """
    optimizer = torch.optim.SGD(
        [
            {"params": backbone.parameters(), "lr": backbone_rate},
            {"params": criterion.parameters(), "lr": CRITERION_RATE},
        ],
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for inputs, labels in batches:
        loss = criterion(model.run(backbone, inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], MAX_GRADIENT_NORM)
        optimizer.step()
        rates.step()
        yield loss.item()
