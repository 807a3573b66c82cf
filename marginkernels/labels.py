# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Brings together what stands against each label of a row, where rows may have several.

A sweep leaves all labels of a row out of its sums, by their index. Where they are to compete with
each other, their logits are added here, N L of them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch
from .call import Call
from .results import SweepResult
from .transforms import IDENTITY, TRANSFORMS, Transform


class Rest(NamedTuple):
    """Holds sums over the classes that stand against a label, (N L,) each."""

    lse: Tensor  # log-sum-exp of the logits, or one versus rest the sum of their softplus
    logit_sum: Tensor  # of the logits, or one versus rest of their sigmoid; or (0,)
    classes: Tensor | int  # how many


def rest_of(
    call: Call, batch: Batch, result: SweepResult, scale: Tensor, transform: Transform
) -> Rest:
    """Returns the sums for each pair of a row and a label."""
    if batch.label.ndim == 1:
        return Rest(result.lse, result.logit_sum, call.num_classes - 1)
    kept, same = batch.kept(), batch.label[:, :, None] == batch.label[:, None, :]
    is_first = kept & ~same.tril(-1).any(2)  # a label that comes twice is one class
    lse, logit_sum = result.lse[:, None], result.logit_sum[:, None]
    if call.settings.other_labels == "exclude":
        distinct = is_first.sum(1, keepdim=True).to(lse.dtype)
        lse, classes = lse.expand(kept.shape), (call.num_classes - distinct).expand(kept.shape)
        logit_sum = logit_sum.expand(kept.shape) if logit_sum.numel() else logit_sum
        return Rest(lse.flatten(), logit_sum.flatten(), classes.flatten())
    competes = is_first[:, None, :] & ~same  # (N, L, L)
    logits = other_logits(result, scale, transform)[:, None, :].expand(same.shape)
    if call.margin.one_versus_rest:
        lse = lse + F.softplus(logits).masked_fill(~competes, 0).sum(2)
        logits = logits.sigmoid()
    else:
        low = torch.finfo(lse.dtype).min / 2  # finite, because -inf - (-inf) would be NaN
        every = torch.cat([lse[:, :, None].expand(*kept.shape, 1), logits], dim=2)
        present = F.pad(competes, (1, 0), value=True)
        lse = every.masked_fill(~present, low).clamp_min(low).logsumexp(2)
    if logit_sum.numel():
        logit_sum = logit_sum + logits.masked_fill(~competes, 0).sum(2)
    return Rest(lse.flatten(), logit_sum.flatten(), call.num_classes - 1)


def other_logits(result: SweepResult, scale: Tensor, transform: Transform) -> Tensor:
    """Returns the logits (N, L) that the labels' classes have as negatives."""
    value = result.target_cosine
    if transform.name != IDENTITY.name:
        name, row_parameter, constants = transform
        c = value.detach()
        made, slope = TRANSFORMS[name].function(c, row_parameter, constants)
        value = made + slope * (value - c)
    bias = 0.0 if result.bias_y is None else result.bias_y
    return scale * value + bias
