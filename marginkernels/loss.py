# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The loss on N numbers: from target logits and the sums over the other classes to one number."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import numerics, ops
from .margins import Rows


class HeadStats(NamedTuple):
    """Detached statistics of the rows, (N,); those of ignored rows are 0 / False.

    Of a sharded head, those of the whole batch, rank after rank.
    """

    target_cosine: Tensor  # cosine to the target class, without margin
    correct: Tensor  # bool: the un-margined target logit exceeds every other
    row_loss: Tensor  # loss of the row, before weights and reduction


def row_norm(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """|x_i| of the rows as rounded, (N,), with a gradient of 0 at zero rows."""
    rounded = ops.rounded(x, compute_dtype)
    return (rounded * rounded).sum(1).clamp_min(numerics.least_norm(compute_dtype) ** 2).sqrt()


def unnormalised_norms(normalize: str, rows: Rows) -> Tensor | None:
    """The norms that a row's target logit keeps, (N,), or None where both sides are normalised."""
    if normalize == "both":
        return None
    return rows.x_norm if normalize == "weight" else rows.x_norm * rows.w_norm


def margined(margin: nn.Module, c: Tensor, rows: Rows) -> Tensor:
    """Calls the margin on the cosines c (N,), and checks and casts what it returns."""
    t = margin(c, rows)
    if not isinstance(t, Tensor) or t.shape != c.shape:
        came = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(
            f"margin: expected {type(margin).__name__} to return a tensor {tuple(c.shape)} "
            f"for the rows' cosines, got {came}"
        )
    return t.to(c.dtype)


def row_losses(
    z_y: Tensor,
    lse: Tensor,
    logit_sum: Tensor,
    num_classes: int,
    label_smoothing: float,
    focal_gamma: float,
    z_loss: float,
) -> Tensor:
    """The loss of each row, (N,), from its target logit and the sums over the other classes."""
    loss = nll = -F.logsigmoid(z_y - lse)
    if label_smoothing > 0:
        loss = loss + label_smoothing / num_classes * ((num_classes - 1) * z_y - logit_sum)
    if focal_gamma > 0:
        loss = loss * _focal_factor(nll, focal_gamma)
    if z_loss > 0:
        loss = loss + z_loss * (z_y + nll) ** 2  # the log-sum-exp over all classes
    return loss


def _focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma from nll = -log p, with a bounded slope at p = 1."""
    return (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny) ** gamma


def reduced(row_loss: Tensor, kept: Tensor, sample_weight: Tensor | None, reduction: str) -> Tensor:
    """The losses of the kept rows, weighted, and their mean or sum where that is asked for."""
    weight = kept.to(row_loss.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.to(row_loss.dtype)
    weighted = row_loss * weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weight.sum()
    return weighted.sum() / torch.where(total > 0, total, 1.0)
