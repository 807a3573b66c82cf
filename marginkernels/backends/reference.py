# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The two ops in plain PyTorch, on any device and up to fp64: the judge of every other backend.

Both go over blocks of classes: one block of the (N, C) logits exists at a time, and backward makes
it again. Meant to be read, and to run everywhere, not to be fast.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..transforms import TRANSFORMS

# numbers in a block: of its logits, and of its classes' rows; and the fewest classes in one
_BLOCK_NUMBERS = 1 << 20
_BLOCK_CLASSES = 128


def unavailable_reasons(
    device_type: str | None = None, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Runs everywhere: no reason is ever given."""
    return []


def _inverse_norm(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return 1 / torch.linalg.vector_norm(rows, dim=1).clamp_min(ops.norm_min(compute_dtype))


class _Block(NamedTuple):
    """Some of the classes, B of them: their rows, and the logits of all rows of x."""

    classes: slice
    w: Tensor  # (B, D) as rounded
    w_inv: Tensor  # (B,)
    w_unit: Tensor  # (B, D): w, normalised where that side is
    product: Tensor  # (N, B) dot products with w_unit: the logits over the scale
    value: Tensor  # (N, B) of the transform
    slope: Tensor  # (N, B) of the transform
    z: Tensor  # (N, B) scale product + bias
    f: Tensor  # (N, B) scale value + bias
    is_target: Tensor  # (N, B)


def _blocks(
    x_unit, w, y, scale, bias, *, normalize_w, compute_dtype, transform, row_parameter, constants
) -> Iterator[_Block]:  # fmt: skip
    if transform not in TRANSFORMS:
        raise ValueError(
            f"transform: the reference backend knows {', '.join(TRANSFORMS)}, got {transform!r}"
        )
    count = max(_BLOCK_NUMBERS // max(*x_unit.shape, 1), _BLOCK_CLASSES)
    for first in range(0, len(w), count):
        classes = slice(first, min(first + count, len(w)))
        rows = ops.rounded(w[classes], compute_dtype)
        w_inv = _inverse_norm(rows, compute_dtype)
        w_unit = rows * w_inv[:, None] if normalize_w else rows
        product = x_unit @ w_unit.T
        value, slope = TRANSFORMS[transform](product, row_parameter, constants)
        z, f = (scale * t if bias is None else scale * t + bias[classes] for t in (product, value))
        is_target = torch.arange(classes.start, classes.stop, device=w.device) == y[:, None]
        yield _Block(classes, rows, w_inv, w_unit, product, value, slope, z, f, is_target)


def head_fwd(
    x, w, y, scale, bias, *, normalize_x, normalize_w, compute_dtype, save_tiles, want_sum,
    want_max, transform, row_parameter, constants,
):  # fmt: skip
    """See :mod:`marginkernels.ops`."""
    x = ops.rounded(x, compute_dtype)
    x_inv = _inverse_norm(x, compute_dtype) if normalize_x else x.new_ones(len(x))
    x_unit = x * x_inv[:, None] if normalize_x else x
    top, logit_max = (x.new_full((len(x),), -math.inf) for _ in range(2))  # of f, and of z
    exp_sum, d, logit_sum = (x.new_zeros(len(x)) for _ in range(3))
    w_inv = x.new_empty(len(w))
    for block in _blocks(
        x_unit, w, y, scale, bias, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
    ):  # fmt: skip
        w_inv[block.classes] = block.w_inv
        d += block.product.masked_fill(~block.is_target, 0).sum(1)
        f = block.f.masked_fill(block.is_target, -math.inf)
        previous, top = top, torch.maximum(top, f.amax(1))
        exp_sum *= torch.exp(previous - _finite(top))
        exp_sum += torch.exp(f - _finite(top)[:, None]).sum(1)
        if want_sum:
            logit_sum += block.f.masked_fill(block.is_target, 0).sum(1)
        if want_max:
            z = block.z.masked_fill(block.is_target, -math.inf)
            logit_max = torch.maximum(logit_max, z.amax(1))
    w_norm = torch.where(y >= 0, 1 / w_inv[y.clamp_min(0)], 0.0)
    return (
        top + exp_sum.log(),
        d,
        w_norm,
        logit_sum if want_sum else x.new_empty(0),
        logit_max if want_max else x.new_empty(0),
        x_inv,
        w_inv,
        x.new_empty(0),
    )


def head_bwd(
    x, w, y, scale, bias, lse, x_inv, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum, *,
    normalize_x, normalize_w, compute_dtype, need_x, need_w, need_bias, need_scale,
    transform, row_parameter, constants,
):  # fmt: skip
    """See :mod:`marginkernels.ops`."""
    rows = ops.rounded(x, compute_dtype)
    x_unit = rows * x_inv[:, None] if normalize_x else rows
    dx = torch.zeros_like(rows) if need_x else None
    dw = w.new_empty(w.shape if need_w else 0)
    dbias = rows.new_empty(len(w) if need_bias else 0)
    dscale = rows.new_zeros(() if need_scale else 0)
    radial = None
    if grad_w_norm is not None:  # what flows through |w_y|, by class
        radial = torch.zeros_like(w_inv)
        radial.index_add_(0, y.clamp_min(0), torch.where(y >= 0, grad_w_norm, 0.0))
    for block in _blocks(
        x_unit, w, y, scale, bias, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
    ):  # fmt: skip
        g = grad_lse[:, None] * torch.exp(block.f - _finite(lse)[:, None])
        if grad_sum is not None:
            g = g + grad_sum[:, None]
        g = g.masked_fill(block.is_target, 0)  # dL/df
        if need_bias:
            dbias[block.classes] = g.sum(0)
        if need_scale:
            dscale += (g * block.value).sum()
        g = torch.where(block.is_target, grad_target[:, None], g * block.slope)
        if need_x:
            dx += g @ block.w_unit
        if need_w:
            part = scale * (g.T @ x_unit)
            if normalize_w:
                part = _project(part, block.w, block.w_inv, compute_dtype)
            if radial is not None:
                unit = _unit_or_zero(block.w, block.w_inv, compute_dtype)
                part = part + radial[block.classes, None] * unit
            dw[block.classes] = part.to(w.dtype)
    if need_x:
        dx *= scale
        dx = (_project(dx, rows, x_inv, compute_dtype) if normalize_x else dx).to(x.dtype)
    return dx if need_x else x.new_empty(0), dw, dbias, dscale


def _finite(maximum: Tensor) -> Tensor:
    """0 for what is infinite, as where all negatives are masked: -inf - (-inf) would be NaN."""
    return torch.where(maximum.isinf(), 0.0, maximum)


def _project(gradient, rows, inverse_norm, compute_dtype):
    """From the gradient of a unit row to that of the row: its tangent part over the norm; 0 for
    zero rows.
    """
    unit = rows * inverse_norm[:, None]
    tangent = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    return (tangent * inverse_norm[:, None]).masked_fill(_is_zero_row(rows, compute_dtype), 0)


def _unit_or_zero(rows, inverse_norm, compute_dtype):
    return (rows * inverse_norm[:, None]).masked_fill(_is_zero_row(rows, compute_dtype), 0)


def _is_zero_row(rows, compute_dtype):
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True) < ops.norm_min(compute_dtype)


def _without_autocast(function):
    """The op has its own compute type: an autocast around the call must not narrow its matmuls."""

    @functools.wraps(function)
    def call(x, *args, **settings):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **settings)

    return call


ops.LIBRARY.impl("head_fwd_reference", _without_autocast(head_fwd), "CompositeExplicitAutograd")
ops.LIBRARY.impl("head_bwd_reference", _without_autocast(head_bwd), "CompositeExplicitAutograd")
