# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Sizes and numpy types of the types that PTX names."""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

# type -> numpy type of its values; bf16 and pairs have none and are handled as bits
DT: dict[str, Any] = {
    **{"b8": u8, "u8": u8, "s8": i8},
    **{"b16": u16, "u16": u16, "s16": i16, "f16": f16, "bf16": u16},
    **{"b32": u32, "u32": u32, "s32": i32, "f32": f32, "tf32": f32, "f16x2": u32, "bf16x2": u32},
    **{"b64": u64, "u64": u64, "s64": i64, "f64": f64},
    "pred": np.bool_,
}
# type -> bits
WIDTH = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}
# type -> bytes, of all types that a variable may have
TYPE_SIZE = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
    "b128": 16,
}
UDT: dict[int, Any] = {
    1: np.bool_,
    8: u16,
    16: u16,
    32: u32,
    64: u64,
}  # bits -> type of a register array
ELEM: dict[int, Any] = {
    1: u8,
    2: u16,
    4: u32,
    8: u64,
    16: np.complex128,
}  # bytes -> type to copy memory with
LOG2 = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}

HALVES = ("f16", "bf16")
PAIRS = ("f16x2", "bf16x2")
FLOATS = (*HALVES, *PAIRS, "f32", "f64", "tf32")
ROUND = {"rn", "rz", "rm", "rp", "rna"}
IROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INT_RANGE = {
    t: (np.iinfo(DT[t]).min, np.iinfo(DT[t]).max)
    for t in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
}
# type -> numpy type and type of a product of double width
WIDE: dict[str, tuple[Any, str]] = {
    "u16": (u32, "u32"),
    "s16": (i32, "s32"),
    "u32": (u64, "u64"),
    "s32": (i64, "s64"),
}


def is_float(ty: str) -> bool:
    """Returns whether a type is a floating-point type or a pair of them."""
    return ty in FLOATS


def align_up(x: int, alignment: int) -> int:
    """Rounds up to a multiple."""
    return (x + alignment - 1) // alignment * alignment
