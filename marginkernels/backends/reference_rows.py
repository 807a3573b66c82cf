# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what the reference backend does to rows: running sums of logits, norms and projections."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import least_norm


class LogSumExp:
    """Adds up exponentials block by block, relative to the greatest so far: none overflows."""

    def __init__(self, rows: Tensor) -> None:  # (N, D), for the number and the type
        self.top = rows.new_full((len(rows),), -math.inf)
        self.total = rows.new_zeros(len(rows))

    def add(self, f: Tensor) -> None:  # (N, B)
        """Adds exp(f); -inf adds nothing."""
        previous, self.top = self.top, torch.maximum(self.top, f.amax(1))
        self.total *= torch.exp(previous - finite(self.top))
        self.total += torch.exp(f - finite(self.top)[:, None]).sum(1)

    def result(self) -> Tensor:
        """Returns the logarithm of the sum of each row, (N,)."""
        return self.top + self.total.log()


class SoftplusSum:
    """Adds up log(1 + exp(f)) block by block."""

    def __init__(self, rows: Tensor) -> None:  # (N, D), for the number and the type
        self.total = rows.new_zeros(len(rows))

    def add(self, f: Tensor) -> None:  # (N, B)
        """Adds the terms; -inf adds nothing."""
        self.total -= F.logsigmoid(-f).sum(1)

    def result(self) -> Tensor:
        """Returns the sum of each row, (N,)."""
        return self.total


def finite(maximum: Tensor) -> Tensor:
    """Replaces infinities by 0: where all negatives are masked, -inf - (-inf) would be NaN."""
    return torch.where(maximum.isinf(), 0.0, maximum)


def inverse_norm(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Returns 1 / |row| for each of ``rows`` (R, D), at most that of the least norm."""
    return 1 / torch.linalg.vector_norm(rows, dim=1).clamp_min(least_norm(compute_dtype))


def projected(
    gradient: Tensor,  # (R, D) of the unit rows
    rows: Tensor,  # (R, D)
    inverse_norm: Tensor,  # (R,)
    compute_dtype: torch.dtype,
) -> Tensor:
    """Turns the gradient of unit rows into that of the rows: its tangent part over the norm.

    The gradient of zero rows is 0.
    """
    unit = rows * inverse_norm[:, None]
    tangent = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    return (tangent * inverse_norm[:, None]).masked_fill(is_zero_row(rows, compute_dtype), 0)


def unit_or_zero(rows: Tensor, inverse_norm: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Returns ``rows`` (R, D) over their norms; 0 for zero rows."""
    return (rows * inverse_norm[:, None]).masked_fill(is_zero_row(rows, compute_dtype), 0)


def is_zero_row(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Says for each of ``rows`` (R, D) whether it is shorter than the least norm, (R, 1)."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True) < least_norm(compute_dtype)
