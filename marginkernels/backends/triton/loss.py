# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_held and head_loss: the work on N numbers before and after the sweep."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .loss_kernels import held_kernel, loss_kernel
from .operands import ceil_div

_HELD_BLOCK = 1024
_LOSS_BLOCK = 512  # rows of a step of the one program, few enough for its registers


def head_held(y: Tensor, *, first: int, count: int, ignore_index: int) -> Tensor:
    """Computes the op of :mod:`marginkernels.row_ops`."""
    y = y.contiguous()
    held = torch.empty_like(y)
    n = len(y)
    if n:
        held_kernel[(ceil_div(n, _HELD_BLOCK),)](
            y, held, N=n, first=first, count=count, ignore_index=ignore_index, BLOCK=_HELD_BLOCK
        )
    return held


def head_loss(
    lse: Tensor,  # (N,)
    target_cosine: Tensor,  # (N,)
    w_norm: Tensor,  # (N,)
    y: Tensor,  # (N,)
    scale: Tensor,  # ()
    sample_weight: Tensor | None,  # (N,)
    logit_max: Tensor,  # (N,) or (0,)
    *,
    ignore_index: int,
    reduction: str,
    rotation: Sequence[float],
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the op of :mod:`marginkernels.row_ops`."""
    n, stats = len(y), len(logit_max) > 0
    each = reduction == "none"
    loss = lse.new_empty(n if each else ())
    slopes = lse.new_empty(3 if need_scale else 2, n)
    row_loss = torch.empty_like(logit_max)
    correct = torch.empty_like(logit_max, dtype=torch.bool)
    cos, sin, threshold, shift, past_cosine, past_phi, less, exact = rotation
    loss_kernel[(1,)](
        lse.contiguous(), target_cosine.contiguous(), w_norm.contiguous(), y.contiguous(), scale,
        None if sample_weight is None else sample_weight.contiguous(),
        logit_max.contiguous() if stats else None, loss, slopes,
        row_loss if stats else None, correct if stats else None, N=n, ignore_index=ignore_index,
        cos=cos, sin=sin, threshold=threshold, shift=shift, past_cosine=past_cosine,
        past_phi=past_phi, less=less, exact=exact, MEAN=reduction == "mean", EACH=each,
        NEED_SCALE=need_scale, BLOCK=_LOSS_BLOCK, num_warps=8,
    )  # fmt: skip
    return loss, slopes, row_loss, correct
