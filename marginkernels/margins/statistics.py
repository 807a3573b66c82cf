# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Statistics of the rows that take part, over the batch, without synchronisation."""

import torch
from torch import Tensor, nn


class WideAverages(nn.Module):
    """Keeps the buffers in ``averages`` in fp32 at least when the module is cast to a narrower
    type, in which the small steps of an average would be rounded away.
    """

    averages: tuple[str, ...] = ()

    def _apply(self, fn, *args, **kwargs):
        before = {name: getattr(self, name) for name in self.averages}
        super()._apply(fn, *args, **kwargs)
        for name, average in before.items():
            applied = getattr(self, name)
            if applied.dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, average.to(applied.device))
        return self


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


def moved_average(average: Tensor, value: Tensor, rate: float, usable: Tensor) -> Tensor:
    """rate value + (1 - rate) average where ``usable`` () holds and the value is finite."""
    moved = rate * value.to(average.dtype) + (1 - rate) * average
    return torch.where(usable & moved.isfinite(), moved, average)
