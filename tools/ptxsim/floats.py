# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes with number formats: bf16, tf32, directed rounding, flushing, fused multiply-add."""

from __future__ import annotations

import numpy as np

from .ptx_types import Array, f32, f64, u16, u32

MIN_NORMAL = f32(2.0**-126)
BF16_MAX = u16(0x7F7F)


def ftz(x: Array) -> Array:
    """Turns subnormal f32 values into zeros of the same sign."""
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(f32(0), x), x)


def f32_to_bf16(x: Array, mode: str = "rn", relu: bool = False, satfinite: bool = False) -> Array:
    """Rounds f32 to bf16 bits (uint16)."""
    x = np.asarray(x, dtype=f32)
    if relu:
        x = np.where(x < 0, f32(0), x)
        x = np.where(x == 0, f32(0), x)
    u = x.view(u32)
    if mode == "rn":
        r = (u + u32(0x7FFF) + ((u >> u32(16)) & u32(1))) >> u32(16)
    elif mode == "rz":
        r = u >> u32(16)
    elif mode == "rna":
        r = (u + u32(0x8000)) >> u32(16)
    else:
        raise NotImplementedError(f"bf16 rounding .{mode}")
    r = r.astype(u16)
    if satfinite:
        over = (r & u16(0x7FFF)) >= u16(0x7F80)
        r = np.where(over, (r & u16(0x8000)) | BF16_MAX, r)
    return np.where(np.isnan(x), u16(0x7FFF), r)


def bf16_to_f32(b: Array) -> Array:
    """Returns bf16 bits as f32."""
    return (np.asarray(b).astype(u32) << u32(16)).view(f32)


def f64_to_f32_odd(x: Array) -> Array:
    """Rounds f64 to odd f32, so that a later rounding to a narrower format is correct."""
    r = x.astype(f32)
    back = r.astype(f64)
    inexact = (back != x) & np.isfinite(back)
    bits = r.view(u32)
    toward = np.where(np.abs(back) > np.abs(x), bits - u32(1), bits)  # truncated
    over = np.isinf(r) & np.isfinite(x)
    toward = np.where(over, bits - u32(1), toward)
    return np.where(inexact | over, toward | u32(1), bits).view(f32)


def f64_to_bf16(x: Array) -> Array:
    """Rounds f64 to bf16 bits, once."""
    return f32_to_bf16(f64_to_f32_odd(np.asarray(x, dtype=f64)))


def f32_to_tf32(x: Array, mode: str = "rna", satfinite: bool = False, relu: bool = False) -> Array:
    """Rounds f32 to 10 mantissa bits."""
    if relu:
        x = np.where(x > 0, x, np.where(np.isnan(x), x, f32(0)))
    u = np.ascontiguousarray(x).view(u32)
    if mode == "rna":
        r = u + u32(0x1000)
    elif mode == "rn":
        r = u + u32(0xFFF) + ((u >> u32(13)) & u32(1))
    elif mode == "rz":
        r = u
    else:
        raise NotImplementedError(f"tf32 rounding .{mode}")
    exponent = u32(0x7F800000)
    special = (u & exponent) == exponent
    r = np.where(special, u, r) & u32(0xFFFFE000)
    if satfinite:
        over = ~special & ((r & exponent) == exponent)
        r = np.where(over, (r & u32(0x80000000)) | u32(0x7F7FE000), r)
    return np.where(np.isnan(x), u32(0x7FFFFFFF), r).view(f32)


def round_to(x: Array, dtype: type, mode: str = "rn", err: Array | None = None) -> Array:
    """Rounds to a narrower format with a PTX rounding mode.

    With `err`, the number is x + err, an exact residue.
    """
    nearest = x.astype(dtype)
    if mode == "rn":
        return nearest
    back = nearest.astype(x.dtype)
    above, below = back > x, back < x
    if err is not None:
        same = back == x
        above |= same & (err < 0)
        below |= same & (err > 0)
    negative = np.signbit(x)
    if mode == "rz":
        down, up = above & ~negative, below & negative
    elif mode == "rm":
        down, up = above, np.zeros_like(above)
    elif mode == "rp":
        down, up = np.zeros_like(above), below
    else:
        raise NotImplementedError(f"rounding .{mode}")
    lower = np.where(down, np.nextafter(nearest, dtype(-np.inf)), nearest)
    return np.where(up, np.nextafter(lower, dtype(np.inf)), lower)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a sum and its rounding error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_prod(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a product and its rounding error, exactly unless the splitting overflows."""

    def split(x: Array) -> tuple[Array, Array]:
        high = x * f64(134217729.0)  # 2**27 + 1
        high = high - (high - x)
        return high, x - high

    p = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """Computes a * b + c in f64 and rounds once more."""
    p = a.astype(f64) * b.astype(f64)  # exact
    c = c.astype(f64)
    if mode == "rn":
        return (p + c).astype(f32)
    s, e = two_sum(p, c)
    return round_to(s, f32, mode, e)


def fma64(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    """Computes a * b + c of f64 with error-free transformations."""
    if mode != "rn":
        raise NotImplementedError(f"fma.{mode}.f64")
    p, e = two_prod(a, b)
    s, t = two_sum(p, c)
    r = s + (t + e)
    big = (np.abs(a) > 1e300) | (np.abs(b) > 1e300) | (np.abs(p) < 1e-280) | ~np.isfinite(r)
    return np.where(big, a * b + c, r)


def arith32(op: str, a: Array, b: Array, mode: str) -> Array:
    """Adds, subtracts, multiplies or divides f32 with a directed rounding mode."""
    x, y = a.astype(f64), b.astype(f64)
    if op == "mul":
        return round_to(x * y, f32, mode)
    if op == "div":
        q = x / y
        p, e = two_prod(q, y)
        remainder = (x - p) - e  # its sign is exact enough to order
        return round_to(q, f32, mode, np.where(y < 0, -remainder, remainder))
    s, e = two_sum(x, -y if op == "sub" else y)
    return round_to(s, f32, mode, e)
