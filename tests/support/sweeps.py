# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks the two ops of a backend themselves, without the loss around them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marginkernels import ops
from marginkernels.testing import assert_within_budget
from marginkernels.transforms import TRANSFORMS
from tests.support.backends import skip_without_tiles
from tests.support.small import C, D, N, batch

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by name
THRESHOLD = 0.3
EDGE = 1e-4  # beside a threshold, where fp32 is on the same side as fp64
# constants by their number: usual ones first, then awkward ones
CONSTANTS = {
    0: [()],
    1: [(THRESHOLD,), (0.37,), (0.0,), (-0.6,), (1.0,), (2.5,)],
    2: [(1.2, 2.0), (0.3, 1e-2), (0.05, 50.0)],
    4: [(3, 0.2, 0.8, 0.6), (1, -0.3, 1.0, 0.0), (5, 0.0, 0.6, 0.8)],
}


def usual_constants(name: str) -> tuple[float, ...]:
    """Returns constants as a loss has them."""
    return CONSTANTS[TRANSFORMS[name].constants][0]


def cosines(constants: tuple[float, ...]) -> Tensor:
    """Returns a grid over [-1, 1] with the ends, their neighbours and both sides of each break.

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
    """Returns the row parameter (n,) and the constants (K,) that the transform takes."""
    constants = usual_constants(name) if constants is None else constants
    return (
        torch.full((n,), THRESHOLD, dtype=dtype) if TRANSFORMS[name].per_row else None,
        torch.tensor(constants, dtype=dtype) if constants else None,
    )


def value_and_slope(
    name: str, c: Tensor, row_parameter: Tensor | None, constants: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Evaluates the definition at cosines (N,), each in a row of its own."""
    value, slope = TRANSFORMS[name].function(c[:, None], row_parameter, constants)
    return value[:, 0], slope[:, 0]


def sweep(
    backend: str,
    device: str,
    name: str,
    scale: float = 2.0,
    constants: tuple[float, ...] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Call, Call]]:
    """Runs both ops with D = 1 and one negative, to read f(z) and f' of each cosine off.

    The other class is the target of every row, which the sweep leaves out. Returns the results, and
    the arguments of both calls.
    """
    constants = usual_constants(name) if constants is None else constants
    c = cosines(constants).float().to(device)
    n = len(c)
    x, w = c[:, None], torch.ones(2, 1, device=device)
    y = torch.ones(n, dtype=torch.int64, device=device)
    parameter, constants = (
        t if t is None else t.to(device) for t in operands(name, n, torch.float32, constants)
    )
    common = dict(
        normalize_x=False, normalize_w=False, compute_dtype=torch.float32, transform=name,
        row_parameter=parameter, constants=constants,
    )  # fmt: skip
    s = torch.tensor(scale, device=device)
    forward = (x, w, y, s, None), dict(save_tiles=False, want_sum=True, want_max=True, **common)
    lse, _, _, logit_sum, logit_max, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(
        *forward[0], **forward[1]
    )
    nothing, one = torch.zeros(n, device=device), torch.ones(n, device=device)
    upstream = (nothing, nothing, None, one)
    if TRANSFORMS[name].one_versus_rest:
        upstream = (one, nothing, None, None)
    backward = (
        (x, w, y, s, None, None, lse, x_inv, w_inv, tiles, *upstream),
        dict(need_x=True, need_w=True, need_bias=False, need_scale=True, **common),
    )
    dx, dw, _, dscale = ops.head_bwd(backend)(*backward[0], **backward[1])
    return (lse, logit_sum, logit_max, dx, dw, dscale), (forward, backward)


def agrees_with_the_definition(
    name: str, constants: tuple[float, ...], backend: str, device: str = "cpu"
) -> None:
    """Checks a transform of a backend point by point."""
    scale, c = 2.0, cosines(constants)
    (lse, logit_sum, logit_max, dx, dw, dscale), _ = sweep(backend, device, name, scale, constants)
    value, slope = value_and_slope(name, c, *operands(name, len(c), F64, constants))
    # a few units in the last place of fp32; the slope near |c| = 1 has the condition number of
    # 1 / sqrt(1 - c^2) at the nearest cosine, which fp32 holds exactly
    close = dict(rtol=2e-6, atol=2e-6, check_device=False, check_dtype=False)
    reduced = summed = scale * value
    g = torch.ones_like(value)
    if TRANSFORMS[name].one_versus_rest:
        reduced, g = -F.logsigmoid(-scale * value), torch.sigmoid(scale * value)
        summed = g
    torch.testing.assert_close(lse, reduced, **close)
    torch.testing.assert_close(logit_sum, summed, **close)
    torch.testing.assert_close(logit_max, scale * c, **close)
    torch.testing.assert_close(dx[:, 0], scale * g * slope, **close)
    assert dw[1, 0] == 0
    for total, terms in ((dw[0, 0], scale * g * slope * c), (dscale, g * value)):
        error = (total.double().cpu() - terms.sum()).abs()
        assert error <= 1e-6 * terms.abs().sum()


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


def wrong_operands_are_named(case: str, backend: str, device: str = "cpu") -> None:
    """Checks the error for operands that are not the transform's."""
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


def backward_makes_the_logits_of_forward(
    learns: str, compute_dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Checks that both sweeps round a logit alike.

    A row's only negative has the probability exp(z - lse) = 1. A rounding more in one of the sweeps
    would change it by a tenth here.
    """
    n, d, scale = 60, 20, 0.37
    x, w = 1000 * torch.randn(n, d, device=device), 1000 * torch.randn(2, d, device=device)
    x, w = x.to(compute_dtype), w.to(compute_dtype)
    y, one = torch.ones(n, dtype=torch.int64, device=device), torch.ones(n, device=device)
    s, bias = torch.tensor(scale, device=device), torch.randn(2, device=device)
    common = dict(
        normalize_x=False, normalize_w=False, compute_dtype=compute_dtype, transform="identity",
        row_parameter=None, constants=None,
    )  # fmt: skip
    lse, *_, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(
        x, w, y, s, bias, save_tiles=False, want_sum=False, want_max=False, **common
    )
    dx, _, dbias, _ = ops.head_bwd(backend)(
        x, w, y, s, bias, None, lse, x_inv, w_inv, tiles, one, 0 * one, None, None, need_x=True,
        need_w=True, need_bias=learns == "bias", need_scale=learns == "scale", **common,
    )  # fmt: skip
    expected = (scale * w[:1].double()).expand(n, d)
    assert lse.abs().median() > 1e5
    assert_within_budget("dx", dx, [dx.new_zeros(n, d).add(expected)], expected, 2)
    if learns == "bias":
        assert dbias[0] == n


def sum_of_logits_that_a_bias_masks(backend: str, device: str = "cpu") -> None:
    """Checks that the sum of the logits is -inf where a bias masks a class.

    Label smoothing wants a probability for every class, and its formula gives that. The gradient is
    that with any other bias.
    """
    n, c = 19, 50
    x, w = torch.randn(n, 8, device=device), torch.randn(c, 8, device=device)
    y, s = torch.arange(n, device=device), torch.tensor(2.0, device=device)
    y[0] = c - 1  # the class that is masked: a row's own is not in its sum
    bias, one = torch.zeros(c, device=device), torch.ones(n, device=device)
    common = dict(
        normalize_x=True, normalize_w=True, compute_dtype=F32, transform="identity",
        row_parameter=None, constants=None,
    )  # fmt: skip
    results = []
    for value in (0.0, -math.inf):
        bias[-1] = value
        lse, _, _, logit_sum, logit_max, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(
            x, w, y, s, bias, save_tiles=False, want_sum=True, want_max=True, **common
        )
        assert torch.equal(logit_sum.isneginf(), (y != c - 1) & (value != 0))
        assert lse.isfinite().all() and logit_max.isfinite().all()
        gradients = ops.head_bwd(backend)(
            x, w, y, s, bias, None, lse, x_inv, w_inv, tiles, 0 * one, 0 * one, None, one,
            need_x=True, need_w=True, need_bias=True, need_scale=True, **common,
        )  # fmt: skip
        results.append(gradients)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def op_arguments(
    backend: str, device: str, compute_dtype: torch.dtype, save_tiles: bool
) -> tuple[Call, Call]:
    """Returns arguments of the forward and of the backward op, as (positional, keywords) each."""
    x, y = batch(device)
    w, scale = torch.randn(C, D, device=device), torch.tensor(16.0, device=device)
    y[3] = -1
    sides = dict(normalize_x=True, normalize_w=True, compute_dtype=compute_dtype)
    functor = dict(transform="identity", row_parameter=None, constants=None)
    extra = not save_tiles
    bias = torch.randn(C, device=device) if extra else None
    fwd = (
        (x, w, y, scale, bias),
        dict(sides, save_tiles=save_tiles, want_sum=extra, want_max=extra, **functor),
    )
    lse, _, _, _, _, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(*fwd[0], **fwd[1])
    grads = [torch.randn(N, device=device) for _ in range(4)]
    grads = grads if extra else [*grads[:2], None, None]
    needs = dict(need_x=True, need_w=True, need_bias=extra, need_scale=extra)
    return fwd, (
        (x, w, y, scale, bias, None, lse, x_inv, w_inv, tiles, *grads),
        dict(sides, **needs, **functor),
    )


def opcheck(
    compute_dtype: torch.dtype, save_tiles: bool, backend: str, device: str = "cpu"
) -> None:
    """Checks schemas, fakes and dispatch of both ops."""
    if save_tiles:
        skip_without_tiles(backend)
    fwd, bwd = op_arguments(backend, device, compute_dtype, save_tiles)
    torch.library.opcheck(ops.head_fwd(backend), *fwd)
    torch.library.opcheck(ops.head_bwd(backend), *bwd)
