# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the results of one sweep over the classes."""

from typing import NamedTuple

from torch import Tensor


class SweepResult(NamedTuple):
    """Holds what a sweep finds for each row, in the one order of ops, Function, exchange and loss.

    Sums and maxima go over the negatives, the classes other than the row's own; see
    :mod:`marginkernels.ops`. Where the classes are split over ranks, a merged result is that of a
    sweep over all classes.
    """

    lse: Tensor  # (N,) log-sum-exp of the logits
    target_cosine: Tensor  # (N,) the target's logit over the scale, without margin and bias
    w_norm: Tensor  # (N,) norm of the target's weights; this and the cosine are 0 without a target
    logit_sum: Tensor  # (N,) or (0,)
    logit_max: Tensor  # (N,) or (0,)
    bias_y: Tensor | None = None  # (N,) the target's bias, where there are biases
