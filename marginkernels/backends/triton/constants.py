# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the numbers that are compiled into the kernels."""

import triton.language as tl

from ... import numerics

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
NO_MAXIMUM = tl.constexpr(numerics.NO_MAXIMUM)
# in the place of a bias of -inf, which masks its class: a sum with such a logit is at most this,
# and pairs that take no part are still told apart
MASKED = tl.constexpr(-3e38)
OFFSET_START = tl.constexpr(float(numerics.OFFSET_START))
# planes of the partial statistics: the maximum and the sum of exponentials, the sum and the maximum
# of the logits
MAXIMUM = tl.constexpr(0)
EXPONENTIALS = tl.constexpr(1)
LOGIT_SUM = tl.constexpr(2)
LOGIT_MAXIMUM = tl.constexpr(3)
PLANES = 4
