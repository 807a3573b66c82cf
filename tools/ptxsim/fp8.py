# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Converts to and from the two 8-bit floating-point formats."""

from __future__ import annotations

import functools

import numpy as np

from .ptx_types import Array, f32, f64, u16

FIRST_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C}


@functools.cache
def fp8_table(kind: str) -> Array:
    """Returns the 256 values of e4m3 or e5m2 in fp64."""
    code = np.arange(256)
    mantissa_bits, bias = (3, 7) if kind == "e4m3" else (2, 15)
    steps = 1 << mantissa_bits
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = code & (steps - 1)
    subnormal = mantissa / steps * 2.0 ** (1 - bias)
    normal = (1 + mantissa / steps) * 2.0 ** (exponent - float(bias))
    value = np.where(exponent == 0, subnormal, normal)
    if kind == "e4m3":
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(code & 0x80, -1.0, 1.0) * value


def to_fp8(x: Array, kind: str, relu: bool) -> Array:
    """Rounds to the nearest code, even ones at a tie, saturating to the largest finite number."""
    codes = FIRST_NOT_FINITE[kind]
    positive = fp8_table(kind)[:codes]
    if relu:
        x = np.where(x < 0, f32(0), x)
    magnitude = np.abs(x.astype(f64))
    above = np.clip(np.searchsorted(positive, magnitude, "left"), 0, codes - 1)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitude - positive[below], positive[above] - magnitude
    nearer_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = np.where(nearer_below, below, above)
    code = np.where(magnitude >= positive[codes - 1], codes - 1, code)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(u16)
