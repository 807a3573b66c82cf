# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Bit patterns of immediate operands."""

from __future__ import annotations

import numpy as np

from ..ptx_types import f32, f64, u32, u64
from ..syntax.elements import Imm


def immediate_bits(operand: Imm, ty: str, bits: int) -> int | bool:
    """Returns the bit pattern of an immediate for an operand of type `ty`."""
    value = operand.value
    if operand.bits == 32 and bits == 64 and ty == "f64":
        return int(np.array([value], u32).view(f32).astype(f64).view(u64)[0])
    if operand.bits:
        return value & ((1 << bits) - 1)
    if ty == "f32" and isinstance(value, float):
        return int(np.array([value], f32).view(u32)[0])
    if isinstance(value, float) or ty == "f64":
        if bits == 32:
            return int(np.array([value], f32).view(u32)[0])
        return int(np.array([float(value)], f64).view(u64)[0])
    return value & ((1 << bits) - 1) if bits > 1 else bool(value)
