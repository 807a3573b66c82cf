# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures accuracy as speaker trainers do: with the margin in the target's logit."""

import torch
from torch import Tensor, nn

from ...loss import HeadStats
from ...margins import Rows


def with_margin(margin: nn.Module, stats: HeadStats, labels: Tensor) -> Tensor:
    """Returns what the margin makes of the targets' cosines, (N,), for one that sees no more."""
    c, ones = stats.target_cosine, torch.ones_like(stats.target_cosine)
    return margin(c, Rows(labels, ones, ones, None))


def hits(t: Tensor, stats: HeadStats, scale: float, penalty: float = 0.0) -> Tensor:
    """Says whether the target's logit exceeds those of all other classes, (N,) bool.

    Args:
        t: the targets' logits over the scale, (N,).
        penalty: the angle by which the nearest of the other classes comes nearer.
    """
    others = stats.other_logit / scale
    if penalty > 0:  # of classes nearer than the penalty, which are as good as equal, the nearest
        others = torch.cos(torch.acos(others.clamp(-1, 1)) - penalty)
    return t > others
