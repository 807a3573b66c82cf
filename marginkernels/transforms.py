# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Negative transforms: what a loss makes of the cosines to the classes that are not the target.

The only part of a loss that lives in kernels. The functions here are the definitions; their twins
are csrc/transforms.h and backends/triton/transforms.py. Each takes the cosines c (N, C), the
parameter of each row (N,) and the constants of the loss (K,), and returns ``(value, slope)``,
(N, C) each: the logit is z = scale value, and slope = d value / d c. Parameters and constants carry
no gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# 1 / sin(theta) is bounded by this at |c| = 1
_SIN_MIN = 1e-4


class Transform(NamedTuple):
    """One of :data:`TRANSFORMS` with its operands."""

    name: str
    row_parameter: Tensor | None = None  # (N,)
    constants: Tensor | None = None  # (K,)


IDENTITY = Transform("identity")


def _identity(c: Tensor, row_parameter: None, constants: None) -> tuple[Tensor, Tensor]:
    return c, torch.ones_like(c)


def _airface(c: Tensor, row_parameter: None, constants: None) -> tuple[Tensor, Tensor]:
    """1 - 2 theta / pi. Li-ArcFace, AirFace (arXiv:1907.12256)."""
    c = c.clamp(-1, 1)
    sine = ((1 - c) * (1 + c)).sqrt()
    return 1 - 2 / math.pi * torch.atan2(sine, c), 2 / math.pi / sine.clamp_min(_SIN_MIN)


def _interclass_filter(c: Tensor, row_parameter: None, constants: Tensor) -> tuple[Tensor, Tensor]:
    """0 where c > threshold. Partial FC (arXiv:2203.15565)."""
    filtered = c > constants[0]
    return c.masked_fill(filtered, 0), torch.ones_like(c).masked_fill(filtered, 0)


def _mv_softmax(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """(t + 1) c + t where c > threshold_i. MV-Softmax (arXiv:1912.00833)."""
    t, hard = constants[0], c > row_parameter[:, None]
    return torch.where(hard, (t + 1) * c + t, c), torch.where(hard, t + 1, torch.ones_like(c))


def _curricular(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """c (t + c) where c > threshold_i. CurricularFace (arXiv:2004.00288)."""
    t, hard = constants[0], c > row_parameter[:, None]
    return torch.where(hard, c * (t + c), c), torch.where(hard, t + 2 * c, torch.ones_like(c))


def _arc_negative(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """t c + t - 1, with t = alpha exp(-(c - a_i)^2 / sigma) taken as a constant. ArcNegFace
    (arXiv:1909.00632).
    """
    alpha, sigma = constants
    t = alpha * torch.exp(-((c - row_parameter[:, None]) ** 2) / sigma)
    return t * c + t - 1, t


TRANSFORMS = {
    "identity": _identity,
    "airface": _airface,
    "interclass_filter": _interclass_filter,
    "mv_softmax": _mv_softmax,
    "curricular": _curricular,
    "arc_negative": _arc_negative,
}
