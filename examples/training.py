# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains: the loop that the demo, the study and the gallery share."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import model

# the class weights turn fast enough only with a larger step than the backbone can take
BACKBONE_RATE, CRITERION_RATE = 0.01, 0.1
SETTINGS: dict[str, Any] = dict(momentum=0.9, nesterov=True, weight_decay=1e-3)
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
    criterion_optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[float]:
    """Trains both and yields the loss after each step; ``criterion(embeddings, labels) -> loss``.

    Args:
        batches: (inputs, labels), ``steps`` of them.
        backbone_rate: the greatest learning rate of the backbone.
        criterion_optimizer: of the criterion's parameters, which then are not clipped; None: the
            backbone's, at a rate of their own.
    """
    groups = [{"params": backbone.parameters(), "lr": backbone_rate}]
    if criterion_optimizer is None:
        groups.append({"params": criterion.parameters(), "lr": CRITERION_RATE})
    optimizer = torch.optim.SGD(groups, **SETTINGS)
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if criterion_optimizer is not None:
        optimizers.append(criterion_optimizer)
    rates = [LambdaLR(each, lambda step: schedule(step, steps)) for each in optimizers]
    for inputs, labels in batches:
        loss = criterion(model.run(backbone, inputs), labels)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], MAX_GRADIENT_NORM)
        for each in optimizers:
            each.step()
        for rate in rates:
            rate.step()
        yield loss.item()
