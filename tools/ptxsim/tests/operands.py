# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes random operands, and asks for nvcc."""

import numpy as np
import pytest

from tools.ptxsim import nvcc

rng = np.random.default_rng(0)


def f32(*shape):
    """Returns normally distributed numbers."""
    return rng.standard_normal(shape).astype(np.float32)


def require_nvcc():
    """Skips the test where there is no nvcc."""
    try:
        nvcc.find_nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
