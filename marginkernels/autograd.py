# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The one autograd Function: two op calls, and the bookkeeping of who needs which gradient."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops


def first_derivative_only(backward: Callable) -> Callable:
    """Makes ``backward(ctx, saved, *grads)`` that of a Function, and refuses to differentiate it.

    ``saved`` are the saved tensors, unpacked once. torch's once_differentiable cuts what it returns
    off from the operands, so that ``torch.autograd.grad`` and what is built on it take a second
    derivative for 0.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return gradients
        tied = [t for t in (*saved, *grads) if t is not None and t.requires_grad]
        return tuple(None if g is None else _Once.apply(g, *tied) for g in gradients)

    return once


class _Once(torch.autograd.Function):
    """A gradient that depends on the operands, and says so only when that is differentiated."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *operands: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("marginkernels: there is no second derivative of a fused loss")


class HeadFunction(torch.autograd.Function):
    """(x, w, bias, scale) -> lse, d, w_norm, logit_sum, logit_max, (N,) or (0,), as in ``ops``.

    Saves the operands and 3 N + C numbers besides (and the tiles, where asked). logit_max has no
    gradient.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (N, D)
        w: Tensor,  # (C, D)
        bias: Tensor | None,  # (C,) in the statistics dtype
        scale: Tensor,  # () in the statistics dtype
        y: Tensor,  # (N,) int64, -1: no target here
        backend: str,
        normalize_x: bool,
        normalize_w: bool,
        compute_dtype: torch.dtype,
        save_tiles: bool,
        want_sum: bool,
        want_max: bool,
        check: str,  # what becomes of a w out of range: "raise", "mark" by NaN, or ""
        transform: str,
        row_parameter: Tensor | None,  # (N,)
        constants: Tensor | None,  # (K,)
    ) -> tuple[Tensor, ...]:
        settings = dict(
            normalize_x=normalize_x, normalize_w=normalize_w, compute_dtype=compute_dtype,
            transform=transform,
        )  # fmt: skip
        operands = dict(row_parameter=row_parameter, constants=constants)
        lse, d, w_norm, logit_sum, logit_max, x_inv, w_inv, tiles = ops.head_fwd(backend)(
            x, w, y, scale, bias,
            save_tiles=save_tiles, want_sum=want_sum, want_max=want_max, **settings, **operands,
        )  # fmt: skip
        norm_max = 1.01 * ops.NORM_MAX  # w_inv is rounded
        if check == "raise":
            lse = ops.checked(lse, 1 / w_inv, 0, norm_max, ops.BAD_W)
        elif check == "mark":  # for the other ranks to see
            lse = torch.where((1 / w_inv <= norm_max).all(), lse, torch.nan)
        ctx.save_for_backward(x, w, bias, scale, y, lse, x_inv, w_inv, tiles, *operands.values())
        ctx.backend, ctx.settings, ctx.want_sum = backend, settings, want_sum
        ctx.mark_non_differentiable(logit_max)
        ctx.set_materialize_grads(False)
        return lse, d, w_norm, logit_sum, logit_max

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, grad_lse, grad_d, grad_w_norm, grad_sum, _):
        # hooks on saved tensors may bring back other strides; the ops read x and w with any
        x, w, *rest = saved
        bias, scale, y, lse, x_inv, w_inv, tiles, row_parameter, constants = (
            t if t is None else t.contiguous() for t in rest
        )
        need_x, need_w, need_bias, need_scale = ctx.needs_input_grad[:4]
        zeros = torch.zeros_like(lse)
        dx, dw, dbias, dscale = ops.head_bwd(ctx.backend)(
            x, w, y, scale, bias, lse, x_inv, w_inv, tiles,
            zeros if grad_lse is None else grad_lse,
            zeros if grad_d is None else grad_d / scale,
            grad_w_norm,
            # a compiled graph hands in zeros for an output that nobody used, here of (0,)
            grad_sum if ctx.want_sum else None,
            need_x=need_x, need_w=need_w, need_bias=need_bias, need_scale=need_scale,
            row_parameter=row_parameter, constants=constants, **ctx.settings,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dw if need_w else None,
            dbias if need_bias else None,
            dscale if need_scale else None,
            *[None] * 12,
        )
