# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes norms of rows, and rows over their norms, as the sweeps see them."""

import torch
from torch import Tensor

from . import numerics, ops


def row_norm(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Returns |x_i| of the rows as rounded, (N,), with a gradient of 0 at zero rows."""
    return _norm(ops.rounded(x, compute_dtype), compute_dtype)


def unit_rows(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Returns the rows as rounded over their norms, (N, D) in the statistics dtype."""
    rows = ops.rounded(x, compute_dtype)
    return rows / _norm(rows, compute_dtype)[:, None]


def _norm(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return (rows * rows).sum(1).clamp_min(numerics.least_norm(compute_dtype) ** 2).sqrt()
