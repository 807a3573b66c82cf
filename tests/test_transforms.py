# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the definitions of the negative transforms, and every backend against them.

Cases follow from the rows of ``TRANSFORMS``. A new transform is tested without a change here, but
for a slope that is not the derivative.
"""

import math

import pytest
import torch
from torch import Tensor

from marginkernels import ops
from marginkernels.backends import native
from marginkernels.transforms import TRANSFORMS
from tests.support import sweeps
from tests.support.simulation import needs_triton
from tests.support.sweeps import CONSTANTS, WRONG, cosines, operands, sweep, value_and_slope

F64 = torch.float64
CASES = [
    pytest.param(name, constants, id="-".join([name, *map(str, constants)]))
    for name, definition in TRANSFORMS.items()
    for constants in CONSTANTS[definition.constants]
]


def test_the_extension_knows_the_transforms_of_python():
    if native.extension is None:
        pytest.skip("no extension")
    known = native.extension.transforms
    assert list(known) == list(TRANSFORMS), "csrc/transforms.h lacks one, or rebuild the extension"
    for name, definition in TRANSFORMS.items():
        assert known[name]["constants"] == definition.constants
        assert known[name]["per_row"] == definition.per_row
        assert known[name]["one_versus_rest"] == definition.one_versus_rest


@needs_triton
def test_triton_knows_the_transforms_of_python():
    from marginkernels.backends.triton.transforms import FUNCTORS

    assert list(FUNCTORS) == list(TRANSFORMS), "backends/triton/transforms.py lacks one"


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_no_slope_exceeds_the_steepest(name, constants):
    c = cosines(constants)
    parameter, k = operands(name, len(c), F64, constants)
    steepest = float(TRANSFORMS[name].steepest_slope(k))
    assert value_and_slope(name, c, parameter, k)[1].abs().max() <= steepest * (1 + 1e-12)
    if native.extension is not None:
        theirs = native.extension.transforms[name]["steepest_slope"](constants)
        assert theirs == pytest.approx(steepest, rel=1e-12)


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_slopes_are_the_derivatives(name, constants):
    # the ends are left out, because slopes of angles are bounded there
    c = cosines(constants)[3:-3]
    parameter, k = operands(name, len(c), F64, constants)
    slope = value_and_slope(name, c, parameter, k)[1]

    def function(c: Tensor) -> Tensor:
        if name == "arc_negative":  # the definition takes its weight for a constant
            return slope * c + slope - 1
        if name == "circle":
            return slope * c
        return value_and_slope(name, c, parameter, k)[0]

    h = 1e-7 * (1 - c.abs())
    numeric = (function(c + h) - function(c - h)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


def test_breaks_belong_to_the_easy_side():
    """Finds classes exactly at a threshold neither hard nor filtered."""
    at = torch.tensor([[0.5]], dtype=F64)
    half = torch.tensor([0.5], dtype=F64)
    for name in ("interclass_filter", "mv_softmax", "curricular"):
        value, slope = TRANSFORMS[name].function(at, half, half)
        assert value.item() == 0.5 and slope.item() == 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_slopes_are_bounded_at_and_beyond_the_ends(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        c = torch.tensor([-1.002, -1.0, 1.0, 1.002], dtype=dtype)
        parameter, constants = operands(name, 4, dtype)
        value, slope = value_and_slope(name, c, parameter, constants)
        steepest = TRANSFORMS[name].steepest_slope(constants)
        assert value.isfinite().all() and (slope.abs() <= 1.01 * steepest).all()


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_backends_agree_with_the_definition(name, constants, backend, device):
    sweeps.agrees_with_the_definition(name, constants, backend, device)


@pytest.mark.parametrize("name", ["curricular", "arc_negative"])
def test_opcheck_with_operands(name, backend, device):
    _, calls = sweep(backend, device, name)
    for op, (args, settings) in zip((ops.head_fwd, ops.head_bwd), calls, strict=True):
        torch.library.opcheck(op(backend), args, settings)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands_are_named(case, backend, device):
    sweeps.wrong_operands_are_named(case, backend, device)


def test_airface_is_linear_in_the_angle():
    theta = torch.linspace(0, math.pi, 101, dtype=F64)
    value, _ = value_and_slope("airface", torch.cos(theta), None, None)
    torch.testing.assert_close(value, 1 - 2 * theta / math.pi, rtol=0, atol=1e-8)
