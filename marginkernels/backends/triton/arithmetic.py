# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds functions of single numbers that several kernels share: twins of those in csrc/math.h."""

# UNIT is compiled in; l is the usual name of a sum of exponentials
# ruff: noqa: E741, N803

import triton
import triton.language as tl

from .constants import LOG2E


@triton.jit
def log1p_of_unit(e):
    """Returns log(1 + e) for e in [0, 1], as 2 atanh(s) with s up to 1/3."""
    s = e / (2.0 + e)
    square = s * s
    p = square * (1.0 / 15.0) + 1.0 / 13.0
    p = p * square + 1.0 / 11.0
    p = p * square + 1.0 / 9.0
    p = p * square + 1.0 / 7.0
    p = p * square + 1.0 / 5.0
    p = p * square + 1.0 / 3.0
    p = p * square + 1.0
    return 2.0 * s * p


@triton.jit
def softplus(z):
    """Returns log(1 + exp(z)) and its slope, sigmoid(z). Both are 0 where z is -inf."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    return log1p_of_unit(e) + tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sum(m, UNIT: tl.constexpr, l):
    """Returns m UNIT + log(l) of a normal l > 0, rounded once where it is large.

    An error of lse is a relative error of every probability, and log(l) alone may be 50.
    """
    bits = l.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # ln 2 in two parts: the product with the first one is exact
    small = tl.fma(exponent, -2.12194440e-4, tl.log(mantissa))
    return tl.fma(exponent, 0.693359375, tl.fma(m, UNIT, small))
