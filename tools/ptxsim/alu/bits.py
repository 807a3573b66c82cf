# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes bit fields, permutations of bytes, and shifts of pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ptx_types import UDT, WIDTH, Array, i64, u32, u64
from .closures import Function


def low_ones(n: Array) -> Array:
    """Returns 64-bit words whose lowest n bits are ones."""
    return np.where(n >= 64, ~u64(0), (u64(1) << np.minimum(n, u64(63))) - u64(1))


def bfe(ty: str) -> Function:
    """Returns bfe, which extracts a bit field."""
    width = WIDTH[ty]

    def operands(b: Array, c: Array) -> tuple[Array, Array]:
        at, n = (np.minimum(x & u32(255), u32(width)).astype(u64) for x in (b, c))
        return at, n

    def unsigned(a: Array, b: Array, c: Array) -> Array:
        at, n = operands(b, c)
        v = a.astype(u64)
        v = np.where(at >= 64, u64(0), v >> np.minimum(at, u64(63)))
        return (v & low_ones(n)).astype(a.dtype)

    def signed(a: Array, b: Array, c: Array) -> Array:
        at, n = operands(b, c)
        inside = np.minimum(at, u64(width - 1))
        v = a.astype(i64) >> inside.astype(i64)
        top = np.minimum(np.minimum(at + n, u64(width)) - inside, u64(64)).astype(i64)
        shift = i64(64) - np.maximum(top, 1)
        return np.where(n == 0, i64(0), (v << shift) >> shift).astype(a.dtype)

    return unsigned if ty[0] == "u" else signed


def bfi(width: int) -> Function:
    """Returns bfi, which inserts a bit field."""

    def insert(a: Array, b: Array, c: Array, d: Array) -> Array:
        at, n = (np.minimum(x & u32(255), u32(64)).astype(u64) for x in (c, d))
        shift = np.minimum(at, u64(63))
        mask = np.where(at < width, low_ones(n) << shift, u64(0))
        result = (b.astype(u64) & ~mask) | ((a.astype(u64) << shift) & mask)
        return result.astype(UDT[width])

    return insert


# the tables that compilers use most
LOP3 = {
    0x96: lambda a, b, c: a ^ b ^ c,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0xEA: lambda a, b, c: (a & b) | c,
    0xF8: lambda a, b, c: a | (b & c),
    0x78: lambda a, b, c: a ^ (b & c),
    0x6A: lambda a, b, c: (a & b) ^ c,
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0xCA: lambda a, b, c: (a & b) | (~a & c),
    0xE8: lambda a, b, c: (a & b) | (c & (a | b)),
}


def lop3(table: int) -> Function:
    """Returns the function of three bits that a table of eight bits describes."""
    if table in LOP3:
        return LOP3[table]

    def function(a: Array, b: Array, c: Array) -> Array:
        result = u32(0)
        for k in range(8):
            if table >> k & 1:
                term = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
                result = result | term
        return result if isinstance(result, np.ndarray) else np.zeros(1, u32)

    return function


# the byte that prmt takes as number k, of a selector
SELECTORS: dict[str | None, Callable[[Array, int], Array]] = {
    None: lambda c, k: (c >> u64(4 * k)) & u64(15),
    "f4e": lambda c, k: (c & u64(3)) + u64(k),
    "b4e": lambda c, k: ((c & u64(3)) - u64(k)) & u64(7),
    "rc8": lambda c, k: c & u64(3),
    "ecl": lambda c, k: np.maximum(c & u64(3), u64(k)),
    "ecr": lambda c, k: np.minimum(c & u64(3), u64(k)),
    "rc16": lambda c, k: (c & u64(1)) * u64(2) + u64(k & 1),
}


def prmt(mode: str | None) -> Function:
    """Returns prmt, which picks four bytes of eight."""
    selector = SELECTORS[mode]

    def pick(words: Array, select: Array) -> Array:
        byte = (words >> ((select & u64(7)) * u64(8))) & u64(0xFF)
        sign = np.where(byte & u64(0x80), u64(0xFF), u64(0))
        return np.where((select & u64(8)) != 0, sign, byte)

    def permute(a: Array, b: Array, c: Array) -> Array:
        words, c = _pair(a, b), c.astype(u64)
        result = u64(0)
        for k in range(4):
            result = result | (pick(words, selector(c, k)) << u64(8 * k))
        return result.astype(u32)

    return permute


def _pair(low: Array, high: Array) -> Array:
    return low.astype(u64) | (high.astype(u64) << u64(32))


def shf(direction: str, mode: str) -> Function:
    """Returns shf, which shifts a pair of words."""

    def shift(low: Array, high: Array, c: Array) -> Array:
        n = (np.minimum(c, u32(32)) if mode == "clamp" else c & u32(31)).astype(u64)
        pair = _pair(low, high)
        return ((pair << n) >> u64(32) if direction == "l" else pair >> n).astype(u32)

    return shift


def bmsk(mode: str) -> Function:
    """Returns bmsk, which makes a mask of b ones from bit a on."""

    def mask(a: Array, b: Array) -> Array:
        if mode == "wrap":
            a, b = a & u32(31), b & u32(31)
        a, b = (np.minimum(x, u32(32)).astype(u64) for x in (a, b))
        return ((((u64(1) << b) - u64(1)) << a) & u64(0xFFFFFFFF)).astype(u32)

    return mask


def szext(mode: str, signed: bool) -> Function:
    """Returns szext, which extends a number of b bits."""

    def extend(a: Array, b: Array) -> Array:
        if mode == "wrap":
            b = b & u32(31)
        n = np.minimum(b, u32(32)).astype(i64)
        v = a.view(u32).astype(i64) & ((i64(1) << n) - 1)
        if signed:
            negative = (n > 0) & ((v >> np.maximum(n - 1, 0)) & 1 == 1)
            v = np.where(negative, v - (i64(1) << n), v)
        return (v & i64(0xFFFFFFFF)).astype(u32).view(a.dtype)

    return extend
