# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The negative transforms: their definitions, and every backend's against them, point by point.

Cases follow from the rows of ``TRANSFORMS``; a new transform is tested without a change here.
"""

import math

import pytest
import torch
from torch import Tensor

from marginkernels import ops
from marginkernels.backends import native
from marginkernels.transforms import TRANSFORMS

F64 = torch.float64
THRESHOLD = 0.3
EDGE = 1e-4  # beside a threshold, where fp32 is on the same side as fp64

# constants by their number: usual ones first, then awkward ones
CONSTANTS = {
    0: [()],
    1: [(THRESHOLD,), (0.37,), (0.0,), (-0.6,), (1.0,), (2.5,)],
    2: [(1.2, 2.0), (0.3, 1e-2), (0.05, 50.0)],
}
CASES = [
    pytest.param(name, constants, id="-".join([name, *map(str, constants)]))
    for name, definition in TRANSFORMS.items()
    for constants in CONSTANTS[definition.constants]
]


def usual_constants(name: str) -> tuple[float, ...]:
    return CONSTANTS[TRANSFORMS[name].constants][0]


def cosines(constants: tuple[float, ...]) -> Tensor:
    """A grid over [-1, 1] with the ends, their neighbours and both sides of each break.

    A definition may break at the parameter of the row and at each constant.
    """
    breaks = [THRESHOLD, *(constant for constant in constants if abs(constant) <= 1)]
    near = [sign * (1 - e) for sign in (-1, 1) for e in (1e-7, 1e-6, 1e-4)]
    near += [b + side * EDGE for b in breaks for side in (-1, 1)]
    points = torch.cat([torch.linspace(-1, 1, 401, dtype=F64), torch.tensor(near, dtype=F64)])
    kept = [abs(p) <= 1 and all(abs(p - b) > EDGE / 2 for b in breaks) for p in points.tolist()]
    return points[kept].sort().values.float().double()  # so that every type holds them


def operands(
    name: str, n: int, dtype: torch.dtype = F64, constants: tuple[float, ...] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The row parameter (n,) and the constants (K,) that the transform takes."""
    constants = usual_constants(name) if constants is None else constants
    return (
        torch.full((n,), THRESHOLD, dtype=dtype) if TRANSFORMS[name].per_row else None,
        torch.tensor(constants, dtype=dtype) if constants else None,
    )


def value_and_slope(
    name: str, c: Tensor, row_parameter: Tensor | None, constants: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition at cosines (N,), each of a row of its own."""
    value, slope = TRANSFORMS[name].function(c[:, None], row_parameter, constants)
    return value[:, 0], slope[:, 0]


def test_the_extension_knows_the_transforms_of_python():
    if native.extension is None:
        pytest.skip("no extension")
    known = native.extension.transforms
    assert list(known) == list(TRANSFORMS)
    for name, definition in TRANSFORMS.items():
        assert known[name]["constants"] == definition.constants
        assert known[name]["per_row"] == definition.per_row


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
    c = cosines(constants)[3:-3]  # without the ends, where the slope of an angle is bounded
    parameter, k = operands(name, len(c), F64, constants)
    slope = value_and_slope(name, c, parameter, k)[1]

    def function(c: Tensor) -> Tensor:
        if name == "arc_negative":  # its weight is taken as a constant
            return slope * c + slope - 1
        return value_and_slope(name, c, parameter, k)[0]

    h = 1e-7 * (1 - c.abs())
    numeric = (function(c + h) - function(c - h)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


def test_breaks_belong_to_the_easy_side():
    """Classes exactly at a threshold are neither hard nor filtered."""
    at = torch.tensor([[0.5]], dtype=F64)
    half = torch.tensor([0.5], dtype=F64)
    for name in ("interclass_filter", "mv_softmax", "curricular"):
        value, slope = TRANSFORMS[name].function(at, half, half)
        assert value.item() == 0.5 and slope.item() == 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_slopes_are_bounded_at_and_beyond_the_ends(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        c = torch.tensor([-1.002, -1.0, 1.0, 1.002], dtype=dtype)
        value, slope = value_and_slope(name, c, *operands(name, 4, dtype))
        assert value.isfinite().all() and (slope.abs() <= 1e4).all()


def sweep(backend, device, name, scale=2.0, constants=None):
    """f(z) / scale and f' of each cosine, read off the two ops: D = 1, one class, no target."""
    constants = usual_constants(name) if constants is None else constants
    c = cosines(constants).float().to(device)
    n = len(c)
    x, w = c[:, None], torch.ones(1, 1, device=device)
    y = torch.full((n,), -1, device=device)
    parameter, constants = (
        t if t is None else t.to(device) for t in operands(name, n, torch.float32, constants)
    )
    common = dict(
        normalize_x=False, normalize_w=False, compute_dtype=torch.float32, transform=name,
        row_parameter=parameter, constants=constants,
    )  # fmt: skip
    s = torch.tensor(scale, device=device)
    forward = (x, w, y, s, None), dict(save_tiles=False, want_sum=True, want_max=True, **common)
    lse, _, _, logit_sum, logit_max, x_inv, w_inv, tiles = ops.head_fwd(backend)(
        *forward[0], **forward[1]
    )
    nothing, one = torch.zeros(n, device=device), torch.ones(n, device=device)
    backward = (
        (x, w, y, s, None, lse, x_inv, w_inv, tiles, nothing, nothing, None, one),
        dict(need_x=True, need_w=True, need_bias=False, need_scale=True, **common),
    )
    dx, dw, _, dscale = ops.head_bwd(backend)(*backward[0], **backward[1])
    return (lse, logit_sum, logit_max, dx, dw, dscale), (forward, backward)


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_backends_agree_with_the_definition(name, constants, backend, device):
    scale, c = 2.0, cosines(constants)
    (lse, logit_sum, logit_max, dx, dw, dscale), _ = sweep(backend, device, name, scale, constants)
    value, slope = value_and_slope(name, c, *operands(name, len(c), F64, constants))
    # a few units in the last place of fp32; the slope near |c| = 1 has the condition number of
    # 1 / sqrt(1 - c^2) at the nearest cosine, which fp32 holds exactly
    close = dict(rtol=2e-6, atol=2e-6, check_device=False, check_dtype=False)
    torch.testing.assert_close(lse, scale * value, **close)
    torch.testing.assert_close(logit_sum, scale * value, **close)
    torch.testing.assert_close(logit_max, scale * c, **close)
    torch.testing.assert_close(dx[:, 0], scale * slope, **close)
    for total, terms in ((dw[0, 0], scale * slope * c), (dscale, value)):
        error = (total.double().cpu() - terms.sum()).abs()
        assert error <= 1e-6 * terms.abs().sum()


@pytest.mark.parametrize("name", ["curricular", "arc_negative"])
def test_opcheck_with_operands(name, backend, device):
    _, calls = sweep(backend, device, name)
    for op, (args, settings) in zip((ops.head_fwd, ops.head_bwd), calls, strict=True):
        torch.library.opcheck(op(backend), args, settings)


ROWS = torch.zeros(3)
# transform, row parameter, constants, bias, complaint
WRONG = {
    "unknown": ("cubic", None, None, None, r"transform: .*curricular.*'cubic'"),
    "too few": ("curricular", ROWS, None, None, "constants: expected 1 .*'curricular', got 0"),
    "too many": ("airface", None, torch.zeros(1), None, "constants: expected 0 .*, got 1"),
    "no rows": ("mv_softmax", None, torch.zeros(1), None, "row_parameter: expected .*got none"),
    "other rows": ("mv_softmax", ROWS[:2], torch.zeros(1), None, r"row_parameter: .* = 3, got"),
    "bias": ("airface", None, None, torch.zeros(4), "bias: expected none .*'airface'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands_are_named(case, backend, device):
    if backend == "reference" and case != "unknown":
        pytest.skip("the definitions are called with what they are given")
    transform, parameter, constants, bias, complaint = WRONG[case]
    x, w, y = torch.rand(3, 2), torch.rand(4, 2), torch.zeros(3, dtype=torch.int64)
    x, w, y, scale, bias, parameter, constants = (
        t if t is None else t.to(device)
        for t in (x, w, y, torch.ones(()), bias, parameter, constants)
    )
    with pytest.raises(ValueError, match=complaint):
        ops.head_fwd(backend)(
            x, w, y, scale, bias, normalize_x=True, normalize_w=True, compute_dtype=torch.float32,
            save_tiles=False, want_sum=False, want_max=False, transform=transform,
            row_parameter=parameter, constants=constants,
        )  # fmt: skip


def test_airface_is_linear_in_the_angle():
    theta = torch.linspace(0, math.pi, 101, dtype=F64)
    value, _ = value_and_slope("airface", torch.cos(theta), None, None)
    torch.testing.assert_close(value, 1 - 2 * theta / math.pi, rtol=0, atol=1e-8)
