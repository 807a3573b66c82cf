# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes sines and angles of cosines, with slopes that stay bounded at |c| = 1."""

import torch
from torch import Tensor

from ..numerics import LEAST_SINE


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """Returns ``value``, exactly, with the derivative ``slope`` with respect to ``c``."""
    return value + slope * (c - c.detach())


def safe_sin(c: Tensor) -> Tensor:
    """Returns the sine of the angle with cosine ``c``, exactly.

    The slope is bounded at and beyond |c| = 1.
    """
    cosine = c.detach()
    value = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(value, -cosine / value.clamp_min(LEAST_SINE), c)


def safe_acos(c: Tensor) -> Tensor:
    """Returns the angle with cosine ``c``, exactly.

    The slope is bounded at and beyond |c| = 1.
    """
    cosine = c.detach()
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(torch.atan2(sine, cosine), -1 / sine.clamp_min(LEAST_SINE), c)
