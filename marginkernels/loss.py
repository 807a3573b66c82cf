# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the loss on N numbers: from the results of a sweep to one number."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .call import Call
from .generators import process_rank
from .labels import Rest, rest_of
from .margins import Rows, name_of
from .results import SweepResult
from .transforms import Transform


class HeadStats(NamedTuple):
    """Holds detached statistics of the rows; they are 0 / False for ignored rows and labels.

    A sharded head has those of the whole batch, rank after rank.
    """

    target_cosine: Tensor  # as the labels: cosine to the target class, without margin
    # as the labels, bool: the un-margined target logit exceeds those of all classes but the labels'
    correct: Tensor
    row_loss: Tensor  # loss of the row, before weights and reduction
    # (N,): the greatest logit of all classes but the labels', as the sweep finds it: without what
    # the margin makes of other classes
    other_logit: Tensor


def loss(
    call: Call,
    batch: Batch,
    result: SweepResult,
    scale: Tensor,
    transform: Transform,
    return_stats: bool,
) -> tuple[Tensor, HeadStats | None]:
    """Returns the loss, and the statistics if they are wanted."""
    target = target_of(call, batch, result, scale)
    seen = statistics(target, result, scale) if return_stats else None
    t = margined(call, target)
    labelled = batch.labelled().flatten()
    rest = rest_of(call, batch, result, scale, transform)
    z_y = target.logit(scale, t)
    if call.margin.one_versus_rest:
        losses = one_versus_rest_losses(call, target, rest, scale, z_y)
    else:
        losses = softmax_losses(call, rest, z_y)
    regularizer = call.margin.regularizer(target.rows)
    if regularizer is not None:
        losses = losses + regularizer
    # a label that no rank holds must not pass for a loss; its row has no gradient
    losses = torch.where(target.found, losses, torch.where(labelled, torch.nan, 0.0))
    row_loss = batch.over_labels(losses)
    has_label = batch.has_label()
    value = reduced(row_loss, has_label, batch.sample_weight, call.settings.reduction)
    if seen is None:
        return value, None
    found = target.found if batch.label.ndim == 1 else target.found.view(batch.label.shape).any(1)
    other = torch.where(has_label & found, result.logit_max, 0)
    return value, HeadStats(*seen, row_loss.detach(), other)


class Target(NamedTuple):
    """Holds what is known of each row's own class, (N,) each; (N L,) for L labels of a row."""

    rows: Rows
    found: Tensor  # bool, whether a rank holds the class
    cosine: Tensor
    norms: Tensor | None  # the norms that the target's logit keeps; None where all are normalised
    bias: Tensor | float

    def logit(self, scale: Tensor, t: Tensor) -> Tensor:
        """Returns the targets' logits with t in place of the cosine."""
        return scale * (t if self.norms is None else self.norms * t) + self.bias


def target_of(call: Call, batch: Batch, result: SweepResult, scale: Tensor) -> Target:
    """Returns the target of each row, from the result of the sweep."""
    w_norm = result.w_norm.flatten()
    found = w_norm.detach() > 0
    w_norm = torch.where(found, w_norm, 1.0)
    rows = batch.pairs(w_norm, scale)
    cosine, norms = result.target_cosine.flatten(), None
    if call.settings.normalize != "both":
        norms = rows.x_norm
        if call.settings.normalize == "none":
            norms = rows.x_norm * w_norm
        cosine = cosine / norms
    bias = 0.0 if result.bias_y is None else result.bias_y.flatten()
    return Target(rows, found, cosine, norms, bias)


def statistics(target: Target, result: SweepResult, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first two of :class:`HeadStats`, before a margin overwrites the cosines."""
    shape = result.target_cosine.shape
    cosine = torch.where(target.found, target.cosine, 0.0).detach()
    z_y = scale * result.target_cosine + (0.0 if result.bias_y is None else result.bias_y)
    highest = result.logit_max if len(shape) == 1 else result.logit_max[:, None]
    return cosine.view(shape), (target.found.view(shape) & (z_y > highest)).detach()


def drawn(call: Call) -> Tensor | None:
    """Draws the random numbers that the margin needs for this rank's labels, or returns None."""
    if not call.margin.training:
        return None
    if call.label.ndim == 1:
        return call.margin.draw(call.x, process_rank())
    noise = call.margin.draw(call.x.repeat_interleave(call.label.shape[1], 0), process_rank())
    return None if noise is None else noise.view(call.label.shape)


def margined(call: Call, target: Target) -> Tensor:
    """Calls the margin on the cosines (N,), and checks and casts what it returns."""
    c, rows = target.cosine, target.rows
    if rows.noise is None:  # in one process they are drawn once the sweep has accepted the batch
        noise = drawn(call)
        rows.noise = None if noise is None else noise.flatten()
    t = call.margin(c, rows)
    if not isinstance(t, Tensor) or t.shape != c.shape:
        came = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(
            f"margin: expected {name_of(call.margin)} to return a tensor {tuple(c.shape)} "
            f"for the rows' cosines, got {came}"
        )
    return t.to(c.dtype)


def one_versus_rest_losses(
    call: Call, target: Target, rest: Rest, scale: Tensor, z_y: Tensor
) -> Tensor:
    """Computes the loss of each label by the margin, from its logit and the sum over the others.

    The sum took a shift of the others' logits for a constant; logit_sum is its slope.
    """
    total, shift = rest.lse, call.margin.shift(target.rows)
    if shift is not None:
        total = total + rest.logit_sum * scale.detach() * (shift - shift.detach())
    return call.margin.combined(z_y, total, target.rows)


def softmax_losses(call: Call, rest: Rest, z_y: Tensor) -> Tensor:
    """Computes the loss of each label from its logit and the sums over the others."""
    s = call.settings
    loss = nll = -F.logsigmoid(z_y - rest.lse)
    if s.label_smoothing > 0:
        share = s.label_smoothing / (rest.classes + 1)
        loss = loss + share * (rest.classes * z_y - rest.logit_sum)
    if s.focal_gamma > 0:
        loss = loss * _focal_factor(nll, s.focal_gamma)
    if s.z_loss > 0:
        loss = loss + s.z_loss * (z_y + nll) ** 2  # the log-sum-exp over all classes
    return loss


def _focal_factor(nll: Tensor, gamma: float) -> Tensor:
    """Returns (1 - p)^gamma from nll = -log p, with a bounded slope at p = 1."""
    return (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny) ** gamma


def reduced(
    row_loss: Tensor, labelled: Tensor, sample_weight: Tensor | None, reduction: str
) -> Tensor:
    """Weights the losses of the labelled rows, and returns their mean or sum where asked for."""
    weight = labelled.to(row_loss.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.to(row_loss.dtype)
    weighted = row_loss * weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weight.sum()
    return weighted.sum() / torch.where(total > 0, total, 1.0)
