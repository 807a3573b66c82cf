# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the one autograd Function: two op calls, and who needs which gradient."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import numerics, ops
from .ops import SweepSettings
from .step import open_update, reaches_weight, require_unchanged
from .transforms import TRANSFORMS


def first_derivative_only(backward: Callable) -> Callable:
    """Turns ``backward(ctx, saved, *grads)`` into a Function's, which refuses to be differentiated.

    ``saved`` are the saved tensors, unpacked once. torch's once_differentiable cuts the gradients
    off from the operands, so that ``torch.autograd.grad`` takes a second derivative for 0.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return gradients
        tied = [t for t in (*saved, *grads) if t is not None and t.requires_grad]
        return tuple(None if g is None else _Once.apply(g, *tied) for g in gradients)

    return once


class _Once(torch.autograd.Function):
    """Ties a gradient to the operands that it depends on, and raises if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *operands: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError("marginkernels: there is no second derivative of a fused loss")


class HeadFunction(torch.autograd.Function):
    """Maps (x, w, bias, scale) to lse, target_cosine, w_norm, logit_sum and logit_max.

    Each is (N,), (N, L) or (0,), as :mod:`marginkernels.ops` says. logit_max has no gradient. Saves
    the operands and 3 N + C numbers besides (and the tiles and the rounded w, where ``settings``
    ask for them). Where an optimizer updates w in backward, w gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, D)
        w: Tensor,  # (C, D)
        bias: Tensor | None,  # (C,) in the statistics dtype
        scale: Tensor,  # () in the statistics dtype
        y: Tensor,  # (N,) or (N, L) int64, -1: no target here
        row_parameter: Tensor | None,  # (N,) of the transform
        constants: Tensor | None,  # (K,) of the transform
        index: Tensor | None,  # (C,) rows of w that are swept, or None for all
        known_w_inv: Tensor | None,  # (C,) inverse norms of w, where they are known
        settings: SweepSettings,
        *state: Tensor,  # of the optimizer whose step backward takes
    ) -> tuple[Tensor, ...]:
        s = settings
        out = ops.Forward(
            *ops.head_fwd(s.backend)(
                x, w, y, scale, bias, index, known_w_inv, normalize_x=s.normalize_x,
                normalize_w=s.normalize_w, compute_dtype=s.compute_dtype, save_tiles=s.save_tiles,
                want_sum=s.want_sum, want_max=s.want_max, transform=s.transform,
                row_parameter=row_parameter, constants=constants, keep_rounded=s.keep_rounded,
                sub_centers=s.sub_centers,
            )
        )  # fmt: skip
        lse = _checked(out.lse, out.w_inv, s.check_w)
        token = None
        if s.update:
            token = open_update(x, s.update) if ctx.needs_input_grad[1] else None
            w = w.data  # the token tells changes of w from the update's own, and torch does not
        ctx.save_for_backward(
            x, w, bias, scale, y, lse, out.x_inv, out.w_inv, out.tiles,
            out.w_rounded if s.keep_rounded else None, row_parameter, constants, index, token,
            *state,
        )  # fmt: skip
        ctx.settings = settings
        without = [out.logit_max]
        if TRANSFORMS[s.transform].one_versus_rest:
            without.append(out.logit_sum)
        ctx.mark_non_differentiable(*without)
        ctx.set_materialize_grads(False)
        return lse, out.target_cosine, out.w_norm, out.logit_sum, out.logit_max

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any,
        saved: tuple[Tensor, ...],  # None where forward had no such operand
        grad_lse: Tensor | None,
        grad_target_cosine: Tensor | None,
        grad_w_norm: Tensor | None,
        grad_sum: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        # hooks on saved tensors may bring back other strides; the ops read x and w with any
        x, w, *rest = saved
        rest, state = rest[:12], list(rest[12:])
        bias, scale, y, lse, x_inv, w_inv, tiles, w_rounded, row_parameter, *rest = (
            t if t is None else t.contiguous() for t in rest
        )
        constants, index, token = rest
        s, needs = ctx.settings, ctx.needs_input_grad[:4]
        need_x, need_w, need_bias, need_scale = needs
        operands = (
            x, w, y, scale, bias, index, lse, x_inv, w_inv, tiles,
            torch.zeros_like(lse) if grad_lse is None else grad_lse,
            torch.zeros_like(y, dtype=lse.dtype)
            if grad_target_cosine is None else grad_target_cosine / scale,
            grad_w_norm,
            # a compiled graph hands in zeros for an output that nobody used, here of (0,)
            grad_sum if s.want_sum and not TRANSFORMS[s.transform].one_versus_rest else None,
        )  # fmt: skip
        wanted = dict(
            normalize_x=s.normalize_x, normalize_w=s.normalize_w, compute_dtype=s.compute_dtype,
            need_x=need_x, need_bias=need_bias, need_scale=need_scale, transform=s.transform,
            row_parameter=row_parameter, constants=constants, w_rounded=w_rounded,
            sub_centers=s.sub_centers,
        )  # fmt: skip
        if token is not None and not reaches_weight(ctx):
            require_unchanged(token, s.update)
            need_w = False
        if token is None or not need_w:
            dx, dw, dbias, dscale = ops.head_bwd(s.backend)(*operands, need_w=need_w, **wanted)
        else:
            dw, need_w = None, False
            dx, dbias, dscale = torch.ops.marginkernels.head_step(
                token, *operands, state, update=s.update, backend=s.backend, **wanted
            )
        return (
            dx if need_x else None, dw if need_w else None, dbias if need_bias else None,
            dscale if need_scale else None, *[None] * (6 + len(state)),
        )  # fmt: skip


def _checked(lse: Tensor, w_inv: Tensor, check_w: str) -> Tensor:
    """Returns lse, which raises or becomes NaN where a row of w is too long to be summed up."""
    norm_max = 1.01 * numerics.GREATEST_NORM  # w_inv is rounded
    if check_w == "raise":
        return ops.checked(lse, w_inv.reciprocal(), 0, norm_max, ops.BAD_W)
    if check_w == "mark":  # for the other ranks to see
        return torch.where((1 / w_inv <= norm_max).all(), lse, torch.nan)
    return lse
