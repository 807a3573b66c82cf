# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The negative transforms, twins of marginkernels/transforms.py, which has the papers.

The tile kernels take one as a constant that is compiled in. Each gets a tile of cosines c
(BLOCK_N, BLOCK_C), the rows' parameter (BLOCK_N, 1) and the constants of the loss, and returns
(value, slope): the logit is scale value, and slope = d value / d c. A cosine of -inf is a class
left out, and its value is -inf too; its slope is nobody's business.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# bound of 1 / sin(theta) in the slope of an angle
MOST_PER_SINE = tl.constexpr(1e4)
TWO_OVER_PI = tl.constexpr(0.636619772)


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


class Functor(NamedTuple):
    """A transform as the tile kernels take it, and what the launchers have to know of it."""

    apply: JITFunction | None  # None: the identity, which costs no instruction
    constants: int
    per_row: bool  # whether it takes a parameter of the row
    steepest: Callable[[Tensor | None], Tensor | float]  # max |slope| over cosines, by constants


FUNCTORS = {
    "identity": Functor(None, 0, False, lambda _: 1.0),
    "airface": Functor(_airface, 0, False, lambda _: 2 / math.pi * MOST_PER_SINE.value),
    "interclass_filter": Functor(_interclass_filter, 1, False, lambda _: 1.0),
    "mv_softmax": Functor(_mv_softmax, 1, True, lambda k: (1 + k[0]).abs().clamp_min(1)),
    "curricular": Functor(_curricular, 1, True, lambda k: 2 + k[0].abs()),
    "arc_negative": Functor(_arc_negative, 2, True, lambda k: k[0].abs()),
}


class Transform(NamedTuple):
    """One of :data:`FUNCTORS` with its operands."""

    apply: JITFunction | None
    operands: tuple[Tensor | None, Tensor | None]  # row parameter (N,), constants (K,)
    steepest: Tensor | float  # most of |slope|, on the device where it depends on a constant

    @classmethod
    def of(
        cls,
        name: str,
        row_parameter: Tensor | None,
        constants: Tensor | None,
        rows: int,
        has_bias: bool,
    ) -> "Transform":
        """Raises ValueError where the operands are not the transform's."""
        if name not in FUNCTORS:
            raise ValueError(
                f"transform: the triton backend knows {', '.join(FUNCTORS)}, got {name!r}"
            )
        functor = FUNCTORS[name]
        given = 0 if constants is None else constants.numel()
        if given != functor.constants:
            raise ValueError(
                f"constants: expected {functor.constants} for the transform {name!r}, got {given}"
            )
        if functor.apply is not None and has_bias:
            raise ValueError(f"bias: expected none with the transform {name!r}")
        if row_parameter is not None and row_parameter.numel() != rows:
            raise ValueError(
                f"row_parameter: expected (N,) = {rows}, got {tuple(row_parameter.shape)}"
            )
        if row_parameter is None and functor.per_row:
            raise ValueError(f"row_parameter: expected (N,) for the transform {name!r}, got none")
        if not functor.constants:
            constants = None
        if not functor.per_row:
            row_parameter = None
        operands = tuple(t if t is None else t.contiguous() for t in (row_parameter, constants))
        return cls(functor.apply, operands, functor.steepest(constants))
