# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the usual losses on N numbers by one op of the backend: the loss and its derivatives.

Every other loss is computed in PyTorch, by :mod:`marginkernels.loss`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import row_ops
from .autograd import first_derivative_only
from .batch import Batch
from .call import Call
from .loss import HeadStats
from .margins import MarginHooks
from .margins.base import DECIDE_T
from .results import SweepResult
from .rotation import Rotation


def rotation_of(call: Call) -> Rotation | None:
    """Returns the margin as the op takes it, or None where the loss is not one of the usual."""
    s, weight = call.settings, call.sample_weight
    if (
        not call.fuses_rows
        or call.label.ndim == 2
        or s.normalize != "both"
        or s.label_smoothing > 0
        or s.z_loss > 0
        or s.focal_gamma > 0
        or call.bias is not None
        or call.row_margin is not None
        or (weight is not None and weight.requires_grad)
        or _has_hooks(call.margin)
    ):
        return None
    return call.margin.rotation()


def loss(
    call: Call,
    batch: Batch,
    result: SweepResult,
    scale: Tensor,
    rotation: Rotation,
    return_stats: bool,
) -> tuple[Tensor, HeadStats | None]:
    """Returns the loss, and the statistics if they are wanted."""
    weight = batch.sample_weight
    value, row_loss, correct = RotatedLoss.apply(
        result.lse, result.target_cosine, scale, result.w_norm.detach(), batch.label,
        None if weight is None else weight.to(call.stats_dtype), result.logit_max, call, rotation,
    )  # fmt: skip
    if not return_stats:
        return value, None
    found = result.w_norm.detach() > 0
    other = torch.where(batch.has_label() & found, result.logit_max, 0)
    return value, HeadStats(result.target_cosine.detach(), correct, row_loss, other)


class RotatedLoss(torch.autograd.Function):
    """Maps (lse, target_cosine, scale) to the loss, and to the losses and hits of the rows.

    Forward computes the derivatives too, so that backward is one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,  # (N,)
        target_cosine: Tensor,  # (N,)
        scale: Tensor,  # ()
        w_norm: Tensor,  # (N,), 0 for a row without a class
        label: Tensor,  # (N,)
        sample_weight: Tensor | None,  # (N,)
        logit_max: Tensor,  # (N,) or (0,)
        call: Call,
        rotation: Rotation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, slopes, row_loss, correct = row_ops.head_loss(call.backend)(
            lse, target_cosine, w_norm, label, scale, sample_weight, logit_max,
            ignore_index=call.settings.ignore_index, reduction=call.settings.reduction,
            rotation=rotation, need_scale=ctx.needs_input_grad[2],
        )  # fmt: skip
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(row_loss, correct)
        ctx.set_materialize_grads(False)
        return value, row_loss, correct

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, *_: None
    ) -> tuple[Tensor | None, ...]:
        (slopes,) = saved
        if grad.ndim == 1:
            # a row of no account is one even if the root, or the logarithm, of its 0 is taken
            grad = torch.where(slopes[0] == 0, 0, grad)
        by_lse, by_cosine, *of_rows = (slopes * grad).unbind()
        by_scale = of_rows[0].sum() if of_rows else None
        return by_lse, by_cosine, by_scale, *[None] * 6


def _has_hooks(margin: MarginHooks) -> bool:
    """Says whether more is to be called with the margin than its ``forward``."""
    return isinstance(margin, nn.Module) and bool(
        margin._forward_hooks
        or margin._forward_pre_hooks
        or margin._backward_hooks
        or margin._backward_pre_hooks
        or vars(margin).keys() & DECIDE_T
    )
