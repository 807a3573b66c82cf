# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the ops on N numbers around the sweeps, which a backend may have (``fuses_rows``).

They serve the usual losses in one launch each. ``head_held_<backend>`` returns the ``y`` of
``head_fwd``: the place of each label among ``count`` classes from ``first`` on, -1 for other labels
and ``ignore_index``. ``head_loss_<backend>`` takes the results of ``head_fwd``, merged over all
ranks, and the labels as given. It returns

    loss           () or, for the reduction "none", (N,)
    slopes         (2, N) the derivatives of the loss with respect to lse and target_cosine, and
                   with ``need_scale`` (3, N), whose last row sums up to that of the scale
    row_loss       (N,) before weights and reduction, or (0,) where logit_max is
    correct        (N,) bool, whether the un-margined target logit exceeds logit_max, or (0,)

of :mod:`marginkernels.loss`, with the margin ``rotation`` of :mod:`marginkernels.rotation`. The
derivatives of "none" are those of the sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from .ops import LIBRARY, define

_HELD_SCHEMA = "(Tensor y, *, int first, int count, int ignore_index) -> Tensor"
_LOSS_SCHEMA = """(Tensor lse, Tensor target_cosine, Tensor w_norm, Tensor y, Tensor scale,
    Tensor? sample_weight, Tensor logit_max, *, int ignore_index, str reduction, float[] rotation,
    bool need_scale) -> (Tensor loss, Tensor slopes, Tensor row_loss, Tensor correct)"""


def head_held(backend: str) -> OpOverloadPacket:
    """Returns the op of a backend that finds the labels among the classes held."""
    return getattr(torch.ops.marginkernels, f"head_held_{backend}")


def head_loss(backend: str) -> OpOverloadPacket:
    """Returns the op of a backend that computes the loss from the results of the sweeps."""
    return getattr(torch.ops.marginkernels, f"head_loss_{backend}")


def define_rows(backend: str) -> None:
    """Defines the ops of a backend, and what they return under torch.compile."""
    define(f"head_held_{backend}", _HELD_SCHEMA, lambda y, **_: torch.empty_like(y))
    define(f"head_loss_{backend}", _LOSS_SCHEMA, _head_loss_fake)


def implement_rows(backend: str, held: Callable, loss: Callable, dispatch_key: str) -> None:
    """Registers Python functions as the kernels of a backend's ops."""
    LIBRARY.impl(f"head_held_{backend}", held, dispatch_key)
    LIBRARY.impl(f"head_loss_{backend}", loss, dispatch_key)


def _head_loss_fake(
    lse: Tensor,
    target_cosine: Tensor,
    w_norm: Tensor,
    y: Tensor,
    scale: Tensor,
    sample_weight: Tensor | None,
    logit_max: Tensor,
    *,
    reduction: str,
    need_scale: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = y.shape[0]
    return (
        lse.new_empty(n if reduction == "none" else ()),
        lse.new_empty(3 if need_scale else 2, n),
        torch.empty_like(logit_max),
        torch.empty_like(logit_max, dtype=torch.bool),
    )
