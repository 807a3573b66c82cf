# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the numbers of the contract in all languages that the kernels are written in."""

import pytest
import torch

from marginkernels import numerics
from marginkernels.backends import native


def as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def test_the_extension_has_the_numbers_of_python():
    if native.extension is None:
        pytest.skip("no extension")
    ours = {name: value for name, value in vars(numerics).items() if name.isupper()}
    theirs = native.extension.numerics
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] in (value, as_float32(value)), name


def test_exponentials_with_a_fixed_offset_neither_overflow_nor_vanish():
    scale = torch.tensor(numerics.OFFSET_SCALE_LIMIT)
    offset = (scale - numerics.OFFSET_START).clamp_min(0)
    least, greatest = torch.exp(-scale - offset), torch.exp(scale - offset)
    assert least >= torch.finfo(torch.float32).tiny
    assert 1e12 * greatest < torch.finfo(torch.float32).max
