# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes with integers: high words of products, quotients, shifts, counts of bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ptx_types import DT, UDT, WIDTH, Array, i32, i64, u32, u64
from .closures import Function

DOUBLE: dict[str, Any] = {"u16": u32, "s16": i32, "u32": u64, "s32": i64}


def mulhi_u64(a: Array, b: Array) -> Array:
    """Returns the high words of products of 64-bit words."""
    mask, shift = u64(0xFFFFFFFF), u64(32)
    a_low, a_high, b_low, b_high = a & mask, a >> shift, b & mask, b >> shift
    middle = a_high * b_low + (a_low * b_low >> shift)
    low = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> shift) + (low >> shift)


def _mulhi_s64(a: Array, b: Array) -> Array:
    ua, ub, zero = a.view(u64), b.view(u64), u64(0)
    high = mulhi_u64(ua, ub)
    return (high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)).view(i64)


def mulhi(ty: str) -> Function:
    """Returns the multiplication that keeps the high half of the product."""
    if ty not in DOUBLE:
        return mulhi_u64 if ty == "u64" else _mulhi_s64
    wide, bits = DOUBLE[ty], WIDTH[ty]
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)


def idiv(ty: str) -> Function:
    """Returns the division that truncates. A quotient by zero has all bits set."""

    def magnitude(x: Array) -> Array:
        unsigned = np.dtype(f"u{x.dtype.itemsize}").type
        return np.where(x < 0, unsigned(0) - x.view(unsigned), x.view(unsigned))

    def quotient(a: Array, b: Array) -> Array:
        zero = b == 0
        b = np.where(zero, b.dtype.type(1), b)
        if ty[0] == "u":
            q = a // b
        else:
            q = magnitude(a) // magnitude(b)
            q = np.where((a < 0) != (b < 0), q.dtype.type(0) - q, q).view(a.dtype)
        return np.where(zero, ~q.dtype.type(0), q)

    return quotient


def irem(ty: str) -> Function:
    """Returns the remainder that belongs to `idiv`."""
    quotient = idiv(ty)
    return lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b)


def shl(width: int) -> Function:
    """Returns the shift to the left."""
    ut = UDT[width]
    return lambda a, b: np.where(b >= width, ut(0), a << (b & u32(width - 1)).astype(ut))


def shr(ty: str, width: int) -> Function:
    """Returns the shift to the right."""
    dt = DT[ty]
    if ty[0] == "s":
        return lambda a, b: a >> np.minimum(b, u32(width - 1)).astype(dt)
    return lambda a, b: np.where(b >= width, dt(0), a >> (b & u32(width - 1)).astype(dt))


def popc(x: Array) -> Array:
    """Counts the ones."""
    return np.bitwise_count(x).astype(u32)


def clz(x: Array) -> Array:
    """Counts the leading zeros."""
    width = x.dtype.itemsize * 8
    count = np.zeros(x.shape, u32)
    y = x.copy()
    for bits in (32, 16, 8, 4, 2, 1):
        if bits < width:
            zero = (y >> x.dtype.type(width - bits)) == 0
            count = count + np.where(zero, u32(bits), u32(0))
            y = np.where(zero, y << x.dtype.type(bits), y)
    return count + (y == 0).astype(u32)


def brev(x: Array) -> Array:
    """Reverses the bits."""
    width = x.dtype.itemsize * 8
    word = x.dtype.type
    shift = 1
    while shift < width:
        mask = ((1 << width) - 1) // ((1 << shift) + 1)  # 0x5555.., 0x3333.., ...
        x = ((x >> word(shift)) & word(mask)) | ((x & word(mask)) << word(shift))
        shift *= 2
    return x


def bfind(ty: str, as_shift: bool) -> Function:
    """Returns what finds the highest bit that is not the sign."""

    def find(x: Array) -> Array:
        if ty[0] == "s":
            x = np.where(x < 0, ~x, x)
        x = x.view(np.dtype(f"u{x.dtype.itemsize}"))
        zeros = clz(x)
        position = zeros if as_shift else u32(x.dtype.itemsize * 8 - 1) - zeros
        return np.where(x == 0, u32(0xFFFFFFFF), position)

    return find
