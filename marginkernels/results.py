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
    # as the labels, (N,) or (N, L): the target's logit over the scale, without margin and bias
    target_cosine: Tensor
    w_norm: Tensor  # as they: norm of the target's weights; both are 0 without a target
    logit_sum: Tensor  # (N,) or (0,)
    logit_max: Tensor  # (N,) or (0,)
    bias_y: Tensor | None = None  # as they: the target's bias, where there are biases
