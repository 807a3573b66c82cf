# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the kernels on the N numbers around the sweeps: the labels before, the loss after.

What: the formulas of marginkernels/rotation.py and marginkernels/loss.py, and their derivatives.
Never materialised: what plain PyTorch would write between its seventy launches.
Fast because: one launch; one program walks over all rows, in a fixed order.
"""

# sizes and flags are capitals, as in the other kernels
# ruff: noqa: N803

import triton
import triton.language as tl

from ... import numerics
from .arithmetic import log1p_of_unit

LEAST_SINE = tl.constexpr(numerics.LEAST_SINE)


@triton.jit(do_not_specialize=["N", "first", "count", "ignore_index"])
def held_kernel(
    labels,  # (N,) int64
    held,  # (N,) int64
    N,
    first,
    count,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Writes the place of each label among ``count`` classes from ``first`` on, or -1."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row, mask=row < N, other=0)
    here = (label >= first) & (label - first < count) & (label != ignore_index)
    tl.store(held + row, tl.where(here, label - first, -1), mask=row < N)


@triton.jit
def _weights(y, sample_weight, row, N, ignore_index):
    """Returns whether rows have a label, and their weights, 0 for those that have none."""
    labelled = (tl.load(y + row, mask=row < N, other=0) != ignore_index) & (row < N)
    weight = tl.where(labelled, 1.0, 0.0)
    if sample_weight is not None:
        weight = tl.load(sample_weight + row, mask=labelled, other=0.0)
    return labelled, weight


@triton.jit(do_not_specialize=["N", "ignore_index"])
def loss_kernel(
    lse,  # (N,)
    target_cosine,  # (N,)
    w_norm,  # (N,), 0: no class
    y,  # (N,) int64, as given
    scale,  # ()
    sample_weight,  # (N,) or None
    logit_max,  # (N,) or None, as the two after the slopes
    loss,  # (), or (N,) for EACH
    slopes,  # (2, N), or (3, N) with NEED_SCALE
    row_loss,  # (N,)
    correct,  # (N,) bool
    N,
    ignore_index,
    cos,  # from here on the numbers of the rotation
    sin,
    threshold,
    shift,
    past_cosine,
    past_phi,
    less,
    exact,
    MEAN: tl.constexpr,
    EACH: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the loss, and its derivatives with respect to lse, target_cosine and scale."""
    share = 1.0
    if MEAN:
        weights = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, N, BLOCK):
            _, weight = _weights(y, sample_weight, start + tl.arange(0, BLOCK), N, ignore_index)
            weights += weight
        total = tl.sum(weights, 0)
        share = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 1.0)
    s = tl.load(scale)
    losses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < N
        labelled, weight = _weights(y, sample_weight, row, N, ignore_index)
        found = tl.load(w_norm + row, mask=inside, other=0.0) > 0.0
        c = tl.load(target_cosine + row, mask=inside, other=0.0)

        square = (1.0 - c) * (1.0 + c)
        sine = tl.sqrt_rn(tl.where(square < 0.0, 0.0, square))  # a NaN stays
        phi = cos * c - sin * sine
        phi_slope = cos + sin * c / tl.where(sine < LEAST_SINE, LEAST_SINE, sine)
        rotates = c > threshold
        t = tl.where(rotates, phi, shift + past_cosine * c + past_phi * phi) - less
        slope = tl.where(rotates, phi_slope, past_cosine + past_phi * phi_slope)
        slope = tl.where(exact == 0.0, 1.0, slope)

        # -log sigmoid(excess), exact also where it is near 0, and 1 - p of the target
        excess = s * t - tl.load(lse + row, mask=inside, other=0.0)
        e = tl.exp(tl.where(excess < 0.0, excess, -excess))
        nll = tl.where(excess < 0.0, -excess, 0.0) + log1p_of_unit(e)
        missed = tl.where(excess < 0.0, 1.0, e) / (1.0 + e)

        # a label that no rank holds must not pass for a loss; its row has no gradient
        each = tl.where(found, nll, tl.where(labelled, float("nan"), 0.0))
        weighted = tl.where(labelled, each * weight, 0.0)
        losses += weighted
        factor = tl.where(found, missed * weight * share, 0.0)
        tl.store(slopes + row, factor, mask=inside)
        tl.store(slopes + N + row, tl.where(found, -factor * s * slope, 0.0), mask=inside)
        if NEED_SCALE:
            tl.store(slopes + 2 * N + row, tl.where(found, -factor * t, 0.0), mask=inside)
        if EACH:
            tl.store(loss + row, weighted, mask=inside)
        if logit_max is not None:
            tl.store(row_loss + row, each, mask=inside)
            hit = found & (s * c > tl.load(logit_max + row, mask=inside, other=0.0))
            tl.store(correct + row, hit, mask=inside)
    if not EACH:
        tl.store(loss, tl.sum(losses, 0) * share)
