# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds margins by class: tables from the class sizes, and learnable ones."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from ..arguments import integer, number
from .base import Rows
from .parametric import Interval
from .target import CosFace


def margins_from_counts(
    counts: Tensor, low: float = 0.05, high: float = 0.5, power: float = 0.25
) -> Tensor:
    """Computes m_c = n_c^-power, mapped linearly to [low, high]: margins by class size (Ha et al.,
    2020, arXiv:2010.05350).

    A table (num_classes,): high for the rarest class, low for the most frequent, all high where the
    sizes are equal. Give it to a margin: ``ArcFace(margins_from_counts(counts))``. The authors'
    landmark recognition has sub-centres too.

    Args:
        counts: (num_classes,), the number of training rows of each class, at least 1.
    """
    if not isinstance(counts, Tensor) or counts.ndim != 1 or counts.numel() == 0:
        came = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"counts: expected a tensor (num_classes,), got {came}")
    if bool((counts < 1).any()):
        raise ValueError(f"counts: expected at least 1 row in each class, got {counts.min()}")
    low, high = number("low", low), number("high", high)
    power = number("power", power, above=0)
    if not low <= high:
        raise ValueError(f"low: expected low <= high, got low={low}, high={high}")
    rarity = counts.double() ** -power
    least, greatest = rarity.aminmax()
    if least == greatest:
        return torch.full_like(rarity, high, dtype=torch.float32)
    return (low + (high - low) * (rarity - least) / (greatest - least)).float()


class AdaMSoftmax(CosFace):
    """Computes t = c - m_y, m (num_classes,) learnable in [0, 1]: AdaM-Softmax of AdaptiveFace (Liu
    et al., CVPR 2019).

    Adds the regulariser weight (1 - mean m), which makes the margins grow where the data let them
    (FaceX-Zoo adds the same 1 so that it is never negative). m is projected onto [0, 1] at every
    forward in training mode. Usual values: scale 30, weight 70; m starts from U(0.3, 0.4) as in
    FaceX-Zoo.

    Args:
        num_classes: C.
        weight: of the regulariser.
    """

    interval = Interval(-math.inf, math.inf)  # an optimizer's step may leave [0, 1] in between

    def __init__(self, num_classes: int, *, weight: float = 70.0):
        num_classes = integer("num_classes", num_classes)
        weight = number("weight", weight, least=0)
        super().__init__(nn.Parameter(torch.empty(num_classes).uniform_(0.3, 0.4)))
        self.weight, self._given_m = weight, None

    @property
    def _table(self) -> Tensor:
        return cast(Tensor, self.m)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws m from U(0.3, 0.4)."""
        self._table.uniform_(0.3, 0.4)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        if self.training:
            with torch.no_grad():
                self._table.clamp_(0, 1)
        return super().forward(c, rows)

    def regularizer(self, rows: Rows) -> Tensor:
        """Computes weight (1 - mean m), ()."""
        return self.weight * (1 - self._table.mean())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight:g}"
