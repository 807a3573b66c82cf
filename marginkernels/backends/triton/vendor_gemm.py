# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Calls the vendor's GEMMs with 16-bit or fp32 operands, fp32 accumulation and an fp32 result.

A 16-bit result would be rounded once per chunk of classes. On CUDA torch writes fp32 from 16-bit
operands. Elsewhere, on ROCm or on a CPU where launches are simulated, the operands are converted
first, which gives the same numbers and costs a copy of each.
"""

import torch
from torch import Tensor


def _fp32_from_half(a: Tensor) -> bool:
    return a.is_cuda and not torch.version.hip and hasattr(torch.ops.aten.mm, "dtype_out")


def mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out = a b."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif _fp32_from_half(a):
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out += a b."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif _fp32_from_half(a):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)
