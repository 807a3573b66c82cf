# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Calls the vendor's GEMMs with 16-bit or fp32 operands, fp32 accumulation and an fp32 result.

A 16-bit result would be rounded once per chunk of classes. On CUDA torch writes fp32 from 16-bit
operands, but not with fp16 accumulation or TunableOp, which are off during the call. Elsewhere, on
ROCm or on a CPU where launches are simulated, the operands are converted first, which gives the
same numbers and costs a copy of each.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

# torch asks the environment first, so that nothing turns it off
_ALWAYS_TUNED = os.environ.get("PYTORCH_TUNABLEOP_ENABLED") == "1"
_NOTHING = contextlib.nullcontext()


def mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out = a b."""
    if _fp32_from_half(a):
        with _allowed():
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out += a b."""
    if _fp32_from_half(a):
        with _allowed():
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), out=out)


def _fp32_from_half(a: Tensor) -> bool:
    """Returns whether torch writes fp32 from operands like this one, which are 16-bit."""
    if a.dtype == torch.float32 or not a.is_cuda or torch.version.hip or _ALWAYS_TUNED:
        return False
    return hasattr(torch.ops.aten.mm, "dtype_out")


def _allowed() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which torch refuses no fp32 result; it is empty where nothing is on."""
    half = torch.backends.cuda.matmul.allow_fp16_accumulation
    return _without(half) if half or torch.cuda.tunable.is_enabled() else _NOTHING


@contextlib.contextmanager
def _without(half: bool) -> Iterator[None]:
    """Turns TunableOp and accumulation in fp16 off inside this context."""
    tuned = torch.cuda.tunable.is_enabled()
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.cuda.tunable.enable(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = half
        torch.cuda.tunable.enable(tuned)
