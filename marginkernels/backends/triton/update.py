# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the update of w in the place of dw: the rules, the rounding, and the kernel.

What: the projection of a row's gradient, the step of the rule, and what is stored of it.
Never materialised: the projected dw, random numbers.
Fast because: a row of the gradient, of w and of its state is in registers from its one load to its
one store.

The rules are twins of marginkernels/rules.py, the rounding is that of marginkernels/rounding.py.
"""

# ruff: noqa: N803, N806

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from ... import rounding, rules
from .row_kernels import projected

UNSCALE = tl.constexpr(rules.UNSCALE)
SKIP = tl.constexpr(rules.SKIP)
MAX_ROW_NORM = tl.constexpr(rules.MAX_ROW_NORM)
OF_RULE = tl.constexpr(rules.OF_RULE)
PHILOX_ROUNDS = tl.constexpr(rounding.PHILOX_ROUNDS)

# A rule gets rows of weights w and of their gradient g (BLOCK_R, BLOCK_D), zeros from D on, and
# their state: per feature as they are, or per row (BLOCK_R, 1), or zeros that it gives back, since
# Triton 3.6 returns no None. ``numbers`` are those of the rule. It returns the new w and state.


@triton.jit
def _sgd(w, g, first, second, numbers, D):
    lr, weight_decay = tl.load(numbers), tl.load(numbers + 1)
    d = g + weight_decay * w
    return w - lr * d, first, second


@triton.jit
def _sgd_with_momentum(w, g, first, second, numbers, D):
    lr, weight_decay = tl.load(numbers), tl.load(numbers + 1)
    momentum, grad_weight = tl.load(numbers + 2), tl.load(numbers + 3)
    direct, through = tl.load(numbers + 4), tl.load(numbers + 5)
    d = g + weight_decay * w
    buffer = momentum * first + grad_weight * d
    return w - lr * (direct * d + through * buffer), buffer, second


@triton.jit
def _adamw(w, g, first, second, numbers, D):
    decay, beta1, beta2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    eps, step_size = tl.load(numbers + 3), tl.load(numbers + 4)
    root_correction = tl.load(numbers + 5)
    mean = first + (1 - beta1) * (g - first)
    square = beta2 * second + (1 - beta2) * g * g
    root = tl.sqrt_rn(square) / root_correction + eps
    return decay * w - step_size * mean / root, mean, square


@triton.jit
def _rowwise_adagrad(w, g, first, second, numbers, D):
    lr, weight_decay, eps = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    d = g + weight_decay * w
    total = first + tl.sum(d * d, 1, keep_dims=True) / D
    return w - lr / (tl.sqrt_rn(total) + eps) * d, total, second


# by name and number of states
FUNCTORS: dict[tuple[str, int], JITFunction] = {
    ("sgd", 0): _sgd,
    ("sgd", 1): _sgd_with_momentum,
    ("adamw", 2): _adamw,
    ("rowwise_adagrad", 1): _rowwise_adagrad,
}


@triton.jit
def random_words(random, class_id, stream, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns 32 random bits for each feature of the classes, (BLOCK_R, BLOCK_D).

    Four features share a call of Philox.
    """
    zeros = tl.zeros((BLOCK_R, BLOCK_D // 4), tl.uint32)
    group = zeros + tl.arange(0, BLOCK_D // 4)[None, :].to(tl.uint32)
    step = zeros + tl.load(random + 1).to(tl.uint32)
    a, b, c, d = tl.philox(
        tl.load(random), group, zeros + class_id[:, None], step, zeros + stream, PHILOX_ROUNDS
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _stochastically_rounded(values, bits):
    """Rounds fp32 to bfloat16 with 16 random bits; infinities and NaN stay."""
    pattern = values.to(tl.uint32, bitcast=True)
    kept = tl.where(values == values, pattern, pattern | 0x400000)
    pattern = tl.where(tl.abs(values) < float("inf"), pattern + bits, kept)
    return (pattern >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["R", "D_UNITS", "D_TILES", "first_class"])
def update_kernel(
    gradient,  # (R, D_TILES * TILE_D) fp32, along the unit rows
    factor,  # () of the gradient, or None
    slot,  # (R,) row of the targets' sums, -1: none
    sums,  # (., D_TILES * TILE_D) fp32: the targets' part
    radial,  # by row of the sums: gradient of the row's norm, or None
    inverse,  # (R,) 1 / |w|, updated
    w,  # (., D_UNITS * UNIT), updated
    first,  # like w, or (., 1) fp32, or None; updated
    second,  # like w, or None; updated
    index,  # (R,) rows of w, or None: as they come
    numbers,  # of the step, see rules.py
    random,  # (2,) int64: seed and step
    R,
    D_UNITS,
    D_TILES,
    first_class,  # global id of the class in row 0 of w
    inverse_limit,  # 1 / norm of a zero row
    RULE: tl.constexpr,
    FIRST_PER_ROW: tl.constexpr,
    PROJECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr,
    DRAW_FIRST: tl.constexpr,  # random bits for w and the first state
    DRAW_SECOND: tl.constexpr,  # for the second state
    UNIT: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least the width
):
    """Applies the gradient along unit rows to w and its state.

    The gradient is made that of raw rows as project_kernel does it. Rows of w are rounded to the
    compute type for that, and are taken as they are stored for the rule.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < tl.where(tl.load(numbers + SKIP) == 0, R, 0)  # no row where a step is skipped
    k = tl.arange(0, BLOCK_D)[None, :]
    D = D_UNITS * UNIT
    width = D_TILES * TILE_D
    kept = there[:, None] & (k < D)
    place = row.to(tl.int64)
    if index is not None:
        place = tl.load(index + row, mask=there, other=0)
    at = place[:, None] * D + k
    w_old = tl.load(w + at, mask=kept, other=0.0).to(tl.float32)

    inv = tl.load(inverse + row, mask=there, other=1.0)
    picked = tl.load(slot + row, mask=there, other=-1).to(tl.int64)
    g = tl.load(gradient + row.to(tl.int64)[:, None] * width + k, mask=kept, other=0.0)
    if factor is not None:
        g *= tl.load(factor)
    added = (picked >= 0)[:, None] & (k < D)
    g += tl.load(sums + picked[:, None] * width + k, mask=added, other=0.0)
    v = w_old.to(COMPUTE_TYPE).to(tl.float32)
    radius = tl.zeros((BLOCK_R,), tl.float32)
    if NORMALIZE:
        radius = -tl.sum(g * v, 1) * inv
    if radial is not None:
        radius += tl.load(radial + picked, mask=picked >= 0, other=0.0)
    g = projected(g, v, inv, radius, inv >= inverse_limit, radial, NORMALIZE)

    g *= tl.load(numbers + UNSCALE)
    most = tl.load(numbers + MAX_ROW_NORM)
    if most < float("inf"):
        norm = tl.sqrt_rn(tl.sum(g * g, 1))
        g *= tl.where(norm > most, most / norm, 1.0)[:, None]
    first_old = tl.zeros((BLOCK_R, 1), tl.float32)
    second_old = first_old
    first_at = place[:, None] if FIRST_PER_ROW else at
    first_kept = there[:, None] if FIRST_PER_ROW else kept
    if first is not None:
        first_old = tl.load(first + first_at, mask=first_kept, other=0.0).to(tl.float32)
    if second is not None:
        second_old = tl.load(second + at, mask=kept, other=0.0).to(tl.float32)
    w_new, first_new, second_new = RULE(w_old, g, first_old, second_old, numbers + OF_RULE, D)
    if PROJECT:
        square = tl.sum(tl.where(kept, w_new * w_new, 0.0), 1)
        unit = 1 / tl.sqrt_rn(square)
        w_new *= tl.where(unit >= inverse_limit, 1.0, unit)[:, None]

    class_id = (place + first_class).to(tl.uint32)
    words = None
    if DRAW_FIRST:
        words = random_words(random, class_id, 0, BLOCK_R, BLOCK_D)
    again = _store(w + at, w_new, words, 0, kept)
    if first is not None:
        _store(first + first_at, first_new, words, 16, first_kept)
    if second is not None:
        if DRAW_SECOND:
            words = random_words(random, class_id, 1, BLOCK_R, BLOCK_D)
        _store(second + at, second_new, words, 0, kept)

    v = again.to(COMPUTE_TYPE).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(tl.where(kept, v * v, 0.0), 1))
    tl.store(inverse + row, tl.minimum(1 / norm, inverse_limit), mask=there)


@triton.jit
def _store(pointers, values, words, SHIFT: tl.constexpr, mask):
    """Stores fp32 numbers in the type of the tensor, and returns them as they are stored.

    bfloat16 is rounded with 16 bits of ``words``, from ``SHIFT`` on.
    """
    if pointers.dtype.scalar.element_ty == tl.bfloat16:
        rounded = _stochastically_rounded(values, (words >> SHIFT) & 0xFFFF)
    else:
        rounded = values.to(pointers.dtype.scalar.element_ty)
    tl.store(pointers, rounded, mask=mask)
    return rounded.to(tl.float32)
