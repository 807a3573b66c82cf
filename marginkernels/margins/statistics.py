# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Statistics of the rows that take part, over the batch, without synchronisation."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean over the kept rows and their number, () each; the mean of no rows is 0."""
    weight = torch.ones_like(values) if kept is None else kept.to(values.dtype)
    count = weight.sum()
    return (values * weight).sum() / count.clamp_min(1), count


def masked_std(values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unbiased standard deviation over the kept rows and their number; that of one row is 0."""
    mean, count = masked_mean(values, kept)
    variance, _ = masked_mean((values - mean) ** 2, kept)
    return (variance * count / (count - 1).clamp_min(1)).sqrt(), count


def move_average(average: Tensor, value: Tensor, rate: float, usable: Tensor) -> None:
    """average <- rate value + (1 - rate) average in place, where ``usable`` () holds.

    A value that is not finite is left out too: the call will fail, what is remembered stays good.
    """
    moved = rate * value.to(average.dtype) + (1 - rate) * average
    average.copy_(torch.where(usable & moved.isfinite(), moved, average))
