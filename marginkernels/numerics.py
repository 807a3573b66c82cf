# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the numbers of the contract between the package and its kernels.

csrc/numerics.h has the same numbers for C++ and CUDA; tests/test_numerics.py compares the two.
"""

import torch

# Rows below this norm are zero rows: their inverse norm is clamped and their gradient is 0.
LEAST_NORM = 1e-12
LEAST_NORM_FLOAT16 = 1e-4
# Calls with longer rows are refused, so that sums of squares stay inside fp32.
GREATEST_NORM = 1e15

# exp(x) of fp32 numbers is 0 below minus this, and does not overflow up to it.
LARGEST_EXPONENT = 87
# With both sides normalised and no bias, logits lie in [-scale, scale]. Exponentials are then
# relative to max(0, scale - OFFSET_START) and need no running maximum: exp(OFFSET_START) leaves
# room in fp32 for a sum over 10^12 classes.
OFFSET_START = 59
# Up to this scale (excluded) exp(-scale - offset) does not vanish either.
OFFSET_SCALE_LIMIT = (OFFSET_START + LARGEST_EXPONENT) / 2

# The running maximum of a row that has met no negative: below any logit in the domain, and finite,
# because -inf - (-inf) would be NaN.
NO_MAXIMUM = -1e30

# Slopes of an angle are taken as if its sine were at least this: they are infinite at |c| = 1.
LEAST_SINE = 1e-4

# The C++ and CUDA kernels pad the rows of saved exponentials to a multiple of this.
TILE_PADDING = 16


def filled(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns a number as a tensor (), without a copy from the host."""
    if torch.compiler.is_compiling():
        # torch.tensor(number) and torch.full would compile a graph for each value
        return torch.ones((), dtype=dtype, device=device) * number
    return torch.full((), number, dtype=dtype, device=device)


def least_norm(compute_dtype: torch.dtype) -> float:
    """Returns the norm below which a row is a zero row in ``compute_dtype``."""
    return LEAST_NORM_FLOAT16 if compute_dtype == torch.float16 else LEAST_NORM
