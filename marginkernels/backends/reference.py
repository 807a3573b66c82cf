# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The two ops in plain PyTorch, on any device and up to fp64: the judge of every other backend.

It materialises the (N, C) logits and recomputes them in backward: meant to be read, not to be fast.
"""

import functools
import math

import torch
from torch import Tensor

from .. import ops
from ..transforms import TRANSFORMS


def unavailable_reasons(
    device_type: str | None = None, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Runs everywhere: no reason is ever given."""
    return []


def _rounded(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The rows as the tile sees them: rounded to the compute type, held in the statistics type."""
    return rows.to(compute_dtype).to(ops.statistics_dtype(compute_dtype))


def _inverse_norm(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return 1 / torch.linalg.vector_norm(rows, dim=1).clamp_min(ops.norm_min(compute_dtype))


def _units(x, w, x_inv, w_inv, normalize_x, normalize_w):
    """The rows whose dot products are the logits over the scale: unit rows on normalised sides."""
    ux = x * x_inv[:, None] if normalize_x else x
    uw = w * w_inv[:, None] if normalize_w else w
    return ux, uw


def _logits(ux, uw, y, scale, bias, transform, row_parameter, constants):
    """(N, C) each: dot products, z, the transform's value and slope, f(z), mask of the target."""
    if transform not in TRANSFORMS:
        raise ValueError(
            f"transform: the reference backend knows {', '.join(TRANSFORMS)}, got {transform!r}"
        )
    product = ux @ uw.T
    value, slope = TRANSFORMS[transform](product, row_parameter, constants)
    z, f = (scale * t if bias is None else scale * t + bias for t in (product, value))
    is_target = torch.arange(len(uw), device=uw.device) == y[:, None]
    return product, z, value, slope, f, is_target


def head_fwd(
    x, w, y, scale, bias, *, normalize_x, normalize_w, compute_dtype, save_tiles, want_sum,
    want_max, transform, row_parameter, constants,
):  # fmt: skip
    """See :mod:`marginkernels.ops`."""
    x, w = _rounded(x, compute_dtype), _rounded(w, compute_dtype)
    x_inv = _inverse_norm(x, compute_dtype) if normalize_x else x.new_ones(len(x))
    w_inv = _inverse_norm(w, compute_dtype)
    ux, uw = _units(x, w, x_inv, w_inv, normalize_x, normalize_w)
    product, z, _, _, f, is_target = _logits(
        ux, uw, y, scale, bias, transform, row_parameter, constants
    )
    owned = y >= 0
    w_norm = torch.where(owned, 1 / w_inv[y.clamp_min(0)], 0.0)
    empty = x.new_empty(0)
    return (
        f.masked_fill(is_target, -math.inf).logsumexp(1),
        product.masked_fill(~is_target, 0).sum(1),
        w_norm,
        f.masked_fill(is_target, 0).sum(1) if want_sum else empty,
        z.masked_fill(is_target, -math.inf).amax(1) if want_max else empty.clone(),
        x_inv,
        w_inv,
        empty.clone(),
    )


def head_bwd(
    x, w, y, scale, bias, lse, x_inv, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum, *,
    normalize_x, normalize_w, compute_dtype, need_x, need_w, need_bias, need_scale,
    transform, row_parameter, constants,
):  # fmt: skip
    """See :mod:`marginkernels.ops`."""
    x_dtype, w_dtype = x.dtype, w.dtype
    x, w = _rounded(x, compute_dtype), _rounded(w, compute_dtype)
    ux, uw = _units(x, w, x_inv, w_inv, normalize_x, normalize_w)
    _, _, value, slope, f, is_target = _logits(
        ux, uw, y, scale, bias, transform, row_parameter, constants
    )
    g = grad_lse[:, None] * torch.exp(f - lse[:, None])
    if grad_sum is not None:
        g = g + grad_sum[:, None]
    g = g.masked_fill(is_target, 0)  # dL/df
    empty = x.new_empty(0)
    dbias = g.sum(0) if need_bias else empty
    dscale = (g * value).sum() if need_scale else empty.clone()
    g = torch.where(is_target, grad_target[:, None], g * slope)
    dx = dw = None
    if need_x:
        dx = scale * (g @ uw)
        dx = _project(dx, x, x_inv, compute_dtype) if normalize_x else dx
    if need_w:
        dw = scale * (g.T @ ux)
        dw = _project(dw, w, w_inv, compute_dtype) if normalize_w else dw
        if grad_w_norm is not None:
            dw = _add_radial(dw, w, w_inv, y, grad_w_norm, compute_dtype)
    return (
        dx.to(x_dtype) if need_x else empty.to(x_dtype, copy=True),
        dw.to(w_dtype) if need_w else empty.to(w_dtype, copy=True),
        dbias,
        dscale,
    )


def _project(gradient, rows, inverse_norm, compute_dtype):
    """From the gradient of a unit row to that of the row: its tangent part over the norm; 0 for
    zero rows.
    """
    unit = rows * inverse_norm[:, None]
    tangent = gradient - (gradient * unit).sum(1, keepdim=True) * unit
    return (tangent * inverse_norm[:, None]).masked_fill(_is_zero_row(rows, compute_dtype), 0)


def _add_radial(dw, w, w_inv, y, grad_w_norm, compute_dtype):
    """Adds what flows through |w_y|, along the rows of w."""
    per_class = torch.zeros_like(w_inv).index_add(
        0, y.clamp_min(0), torch.where(y >= 0, grad_w_norm, 0.0)
    )
    unit = (w * w_inv[:, None]).masked_fill(_is_zero_row(w, compute_dtype), 0)
    return dw + per_class[:, None] * unit


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
