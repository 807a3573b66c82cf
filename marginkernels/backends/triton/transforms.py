# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the negative transforms: twins of marginkernels/transforms.py, which has the papers.

A tile kernel is compiled with one of them. A transform gets a tile of cosines c (BLOCK_N, BLOCK_C),
the parameter of each row (BLOCK_N, 1) and the constants of the loss. It returns (value, slope): the
logit is scale value, and slope = d value / d c. A cosine of -inf is a class left out: its value is
-inf too, and its slope finite, because kernels multiply it by 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from ... import numerics
from ... import transforms as definitions

MOST_PER_SINE = tl.constexpr(1 / numerics.LEAST_SINE)
TWO_OVER_PI = tl.constexpr(definitions.TWO_OVER_PI)


@triton.jit
def _airface(c, parameter, constants):
    magnitude = tl.minimum(tl.abs(c), 1.0)
    # acos of the magnitude within 2e-8: Abramowitz and Stegun 4.4.46
    p = magnitude * -0.0012624911 + 0.0066700901
    p = p * magnitude - 0.0170881256
    p = p * magnitude + 0.0308918810
    p = p * magnitude - 0.0501743046
    p = p * magnitude + 0.0889789874
    p = p * magnitude - 0.2145988016
    p = p * magnitude + 1.5707963050
    angle = tl.sqrt(1.0 - magnitude) * p * TWO_OVER_PI  # in right angles
    value = tl.where(c < 0.0, angle - 1.0, 1.0 - angle)
    per_sine = tl.minimum(tl.rsqrt((1.0 - magnitude) * (1.0 + magnitude)), MOST_PER_SINE)
    return tl.where(c == float("-inf"), c, value), TWO_OVER_PI * per_sine


@triton.jit
def _interclass_filter(c, parameter, constants):
    filtered = c > tl.load(constants)
    return tl.where(filtered, 0.0, c), tl.where(filtered, 0.0, 1.0)


@triton.jit
def _mv_softmax(c, parameter, constants):
    t, hard = tl.load(constants), c > parameter
    return tl.where(hard, (t + 1.0) * c + t, c), tl.where(hard, t + 1.0, 1.0)


@triton.jit
def _curricular(c, parameter, constants):
    t, hard = tl.load(constants), c > parameter
    return tl.where(hard, c * (t + c), c), tl.where(hard, t + 2.0 * c, 1.0)


@triton.jit
def _arc_negative(c, parameter, constants):
    distance = c - parameter
    t = tl.load(constants) * tl.exp(distance * distance * (-1.0 / tl.load(constants + 1)))
    return tl.where(c == float("-inf"), c, t * c + t - 1.0), t


@triton.jit
def _circle(c, parameter, constants):
    m = tl.load(constants)
    weight = tl.maximum(c + m, 0.0)
    return tl.where(c == float("-inf"), c, weight * (c - m)), weight


@triton.jit
def _rotated_back(c, cos, sin):
    """Computes cos(theta - p) and its slope, by the cosine and sine of p."""
    square = tl.maximum((1.0 - c) * (1.0 + c), 0.0)
    per_sine = tl.minimum(tl.rsqrt(square), MOST_PER_SINE)
    return cos * c + sin * tl.sqrt(square), cos - sin * c * per_sine


@triton.jit
def _hardest(c, parameter, constants):
    near = c >= parameter
    value, slope = _rotated_back(tl.maximum(c, -1.0), tl.load(constants), tl.load(constants + 1))
    return tl.where(near, value, c), tl.where(near, slope, 1.0)


@triton.jit
def _sphereface2(c, parameter, constants):
    t = tl.load(constants)
    within = tl.minimum(tl.maximum(c, -1.0), 1.0)
    value, slope = _rotated_back(within, tl.load(constants + 2), tl.load(constants + 3))
    half = tl.maximum((value + 1.0) * 0.5, 0.0)
    power = tl.full(half.shape, 1.0, tl.float32)  # half^(t - 1)
    for _ in range(1, t.to(tl.int32)):
        power *= half
    value = 2.0 * power * half - 1.0 + tl.load(constants + 1)
    return tl.where(c == float("-inf"), c, value), t * power * slope


# compiled into the tile kernels; None: the identity, which costs no instruction
FUNCTORS: dict[str, JITFunction | None] = {
    "identity": None,
    "airface": _airface,
    "interclass_filter": _interclass_filter,
    "mv_softmax": _mv_softmax,
    "curricular": _curricular,
    "arc_negative": _arc_negative,
    "circle": _circle,
    "hardest": _hardest,
    "sphereface2": _sphereface2,
}


class Transform(NamedTuple):
    """Holds one of :data:`FUNCTORS` with its operands."""

    apply: JITFunction | None
    operands: tuple[Tensor | None, Tensor | None]  # row parameter (N,), constants (K,)
    steepest: Tensor | float  # most of |slope|, on the device where it depends on a constant
    one_versus_rest: bool  # the sums, see the definition

    @classmethod
    def of(
        cls,
        name: str,
        row_parameter: Tensor | None,
        constants: Tensor | None,
        rows: int,
        has_bias: bool,
    ) -> "Transform":
        """Checks the operands, and returns them with the functor of this name.

        Raises:
            ValueError: the operands are not the transform's.
        """
        _, row_parameter, constants = definitions.checked(
            "triton", FUNCTORS, name, row_parameter, constants, rows=rows, has_bias=has_bias
        )
        definition = definitions.TRANSFORMS[name]
        steepest = definition.steepest_slope(constants)
        operands = (
            None if row_parameter is None else row_parameter.contiguous(),
            None if constants is None else constants.contiguous(),
        )
        return cls(FUNCTORS[name], operands, steepest, definition.one_versus_rest)
