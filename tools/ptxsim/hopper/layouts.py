# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says where operands of wgmma lie in shared memory, and what their bytes mean."""

from __future__ import annotations

import numpy as np

from ..fp8 import fp8_table
from ..ptx_types import Array, f16, f32, f64, i8, u8, u16, u32

# elements along K, always 32 bytes
K_OF = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
RESERVED = 0x3FF1C000C000C000  # bits of a matrix descriptor that must be zero
# bits 62-63 of a descriptor: none, 128, 64, 32 bytes -> 16-byte chunks in a row - 1
CHUNKS_MASK = {0: 0, 1: 7, 2: 3, 3: 1}


def chunk_offsets(descriptor: int, mn: int, mn_major: int) -> Array:
    """Returns where the 16-byte chunks of an operand lie in the CTA's shared memory.

    A K-major operand is (mn, 2 chunks along K), an MN-major one of 16-bit elements (16 along K,
    mn / 8 chunks). Eight rows (K-major) or columns (MN-major) of one, two, four or eight chunks
    make a swizzle atom. The swizzle permutes the chunks of a 128-byte line by the line's number,
    which it takes from the address.
    """
    start, lead, stride = (((descriptor >> s) & 0x3FFF) << 4 for s in (0, 16, 32))
    base, mask = (descriptor >> 49) & 7, CHUNKS_MASK[descriptor >> 62]
    width = mask + 1
    if mn_major:
        line, col = np.arange(16)[:, None], np.arange(mn // 8)
        if mask:
            inside = line % 8 * width + col % width
            outside = line // 8 * stride + col // width * lead
        else:
            inside, outside = line % 8, line // 8 * lead + col * stride
    else:
        line, col = np.arange(mn)[:, None], np.arange(2)
        if mask:
            inside, outside = line % 8 * width + col, line // 8 * stride
        else:
            inside, outside = line % 8, line // 8 * stride + col * lead
    a = start + inside * 16 + outside
    return a ^ ((((a >> 7) - base) & mask) << 4)


def decode(raw: Array, kind: str) -> Array:
    """Returns words or bytes as f64; the last axis grows to the number of elements."""
    if kind == "bf16":
        return (raw.view(u16).astype(u32) << u32(16)).view(f32).astype(f64)
    if kind == "f16":
        return raw.view(f16).astype(f64)
    if kind == "tf32":
        return (raw.view(u32) & u32(0xFFFFE000)).view(f32).astype(f64)
    if kind in ("s8", "u8"):
        return raw.view(i8 if kind == "s8" else u8).astype(f64)
    return fp8_table(kind)[raw.view(u8)]
