# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the negative transforms: how a loss changes the cosines to classes that are no target.

Transforms are the only part of a loss that lives in kernels. The functions here are the
definitions; their twins are csrc/transforms.h and backends/triton/transforms.py. Each function
takes the cosines c (N, C), the parameter of each row (N,) and the constants of the loss (K,). It
returns ``(value, slope)``, (N, C) each: the logit is z = scale value, and slope = d value / d c.
Parameters and constants carry no gradient.

A transform also says how a row's logits are brought together: most by log-sum-exp, as softmax has
it, those of one-versus-rest losses by the sum of their softplus.

A new transform is a row of :data:`TRANSFORMS` here, a functor in csrc/transforms.h and a twin in
backends/triton/transforms.py; tests/test_transforms.py takes its cases from the row.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import LEAST_SINE

TWO_OVER_PI = 2 / math.pi


class Transform(NamedTuple):
    """Names one of :data:`TRANSFORMS` and holds its operands."""

    name: str
    row_parameter: Tensor | None = None  # (N,)
    constants: Tensor | None = None  # (K,)


IDENTITY = Transform("identity")


def constants(like: Tensor, *numbers: float) -> Tensor:
    """Returns numbers as a tensor (K,).

    It is filled on the device, where torch.tensor would copy and wait.
    """
    return torch.cat([like.new_full((1,), number) for number in numbers])


def _identity(c: Tensor, row_parameter: None, constants: None) -> tuple[Tensor, Tensor]:
    return c, torch.ones_like(c)


def _airface(c: Tensor, row_parameter: None, constants: None) -> tuple[Tensor, Tensor]:
    """Computes 1 - 2 theta / pi. Li-ArcFace, AirFace (arXiv:1907.12256)."""
    c = c.clamp(-1, 1)
    sine = ((1 - c) * (1 + c)).sqrt()
    return 1 - TWO_OVER_PI * torch.atan2(sine, c), TWO_OVER_PI / sine.clamp_min(LEAST_SINE)


def _interclass_filter(c: Tensor, row_parameter: None, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes 0 where c > threshold. Partial FC (arXiv:2203.15565)."""
    filtered = c > constants[0]
    return c.masked_fill(filtered, 0), torch.ones_like(c).masked_fill(filtered, 0)


def _mv_softmax(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (t + 1) c + t where c > threshold_i. MV-Softmax (arXiv:1912.00833)."""
    t, hard = constants[0], c > row_parameter[:, None]
    return torch.where(hard, (t + 1) * c + t, c), torch.where(hard, t + 1, torch.ones_like(c))


def _curricular(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes c (t + c) where c > threshold_i. CurricularFace (arXiv:2004.00288)."""
    t, hard = constants[0], c > row_parameter[:, None]
    return torch.where(hard, c * (t + c), c), torch.where(hard, t + 2 * c, torch.ones_like(c))


def _arc_negative(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes t c + t - 1, with t = alpha exp(-(c - a_i)^2 / sigma) taken as a constant.
    ArcNegFace (arXiv:1909.00632).
    """
    alpha, sigma = constants
    t = alpha * torch.exp(-((c - row_parameter[:, None]) ** 2) / sigma)
    return t * c + t - 1, t


def _circle(c: Tensor, row_parameter: None, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes a (c - m), with a = max(c + m, 0) taken as a constant.
    Circle loss (arXiv:2002.10857).
    """
    m = constants[0]
    weight = (c + m).clamp_min(0)
    return weight * (c - m), weight


def _hardest(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes cos(theta - p) where c >= threshold_i, by the cosine and sine of p.
    Inter-top-k penalty (arXiv:2110.05042).
    """
    near = c >= row_parameter[:, None]
    value, slope = _rotated_back(c, *constants)
    return torch.where(near, value, c), torch.where(near, slope, torch.ones_like(c))


def _sphereface2(c: Tensor, row_parameter: None, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes 2 u^t - 1 + shift, with u = (cos(theta - m) + 1) / 2.
    SphereFace2 (arXiv:2108.01513). The constants are t, a positive integer, the shift, and the
    cosine and sine of m.
    """
    t, shift, cos, sin = constants
    value, slope = _rotated_back(c.clamp(-1, 1), cos, sin)
    half = ((value + 1) / 2).clamp_min(0)
    return 2 * half**t - 1 + shift, t * half ** (t - 1) * slope


def _rotated_back(c: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes cos(theta - p) and its slope, bounded at |c| = 1."""
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    return cos * c + sin * sine, cos - sin * c / sine.clamp_min(LEAST_SINE)


class Definition(NamedTuple):
    """Holds the facts of a transform that its twins must share."""

    name: str
    # (c, row_parameter, constants) -> (value, slope); None where it takes no such operand
    function: Callable[..., tuple[Tensor, Tensor]]
    constants: int  # K
    per_row: bool  # whether it takes a parameter of the row
    # an upper bound of |slope| over all cosines, by the constants (K,), which stay on the device
    steepest_slope: Callable[..., Tensor | float]
    one_versus_rest: bool = False  # rows get the sum of softplus(z) in the place of log sum exp z


def _steepest_rotation(cos: Tensor, sin: Tensor) -> Tensor:
    return cos.abs() + sin.abs() / LEAST_SINE


_DEFINITIONS = (
    Definition("identity", _identity, 0, False, lambda _: 1.0),
    Definition("airface", _airface, 0, False, lambda _: TWO_OVER_PI / LEAST_SINE),
    Definition("interclass_filter", _interclass_filter, 1, False, lambda _: 1.0),
    Definition("mv_softmax", _mv_softmax, 1, True, lambda constants: constants[0].abs() + 1),
    Definition("curricular", _curricular, 1, True, lambda constants: constants[0].abs() + 2),
    Definition("arc_negative", _arc_negative, 2, True, lambda constants: constants[0].abs()),
    Definition("circle", _circle, 1, False, lambda constants: constants[0].abs() + 1),
    Definition("hardest", _hardest, 2, True, lambda constants: _steepest_rotation(*constants)),
    Definition(
        "sphereface2",
        _sphereface2,
        4,
        False,
        lambda constants: constants[0] * _steepest_rotation(*constants[2:]),
        one_versus_rest=True,
    ),
)
TRANSFORMS = {definition.name: definition for definition in _DEFINITIONS}


def checked(
    backend: str,
    known: Collection[str],  # names of the transforms that the backend has
    name: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    *,
    rows: int,
    has_bias: bool,
) -> Transform:
    """Bundles a transform with the operands that it takes, for a backend that was given them.

    Raises:
        ValueError: the name is unknown, or the operands are not the transform's.
    """
    if name not in TRANSFORMS or name not in known:
        raise ValueError(f"transform: the {backend} backend knows {', '.join(known)}, got {name!r}")
    definition = TRANSFORMS[name]
    given = 0 if constants is None else constants.numel()
    if given != definition.constants:
        raise ValueError(
            f"constants: expected {definition.constants} for the transform {name!r}, got {given}"
        )
    if name != IDENTITY.name and has_bias:
        raise ValueError(f"bias: expected none with the transform {name!r}")
    if row_parameter is not None and row_parameter.numel() != rows:
        raise ValueError(f"row_parameter: expected (N,) = {rows}, got {tuple(row_parameter.shape)}")
    if row_parameter is None and definition.per_row:
        raise ValueError(f"row_parameter: expected (N,) for the transform {name!r}, got none")
    return Transform(
        name,
        row_parameter if definition.per_row else None,
        constants if definition.constants else None,
    )
