# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the kernels that are linear in N, C D or N D: norms, merges, projections.

What: what is beside the tiles and target_kernels.py, in fp32, in a fixed order, without atomics.
Never materialised: normalised rows, a second copy of dw.
Fast because: each row of x, w and dw is read or written once per sweep, by one program.
"""

# sizes and flags are capitals, as in the formulas; l is the usual name of a sum of exponentials.
# A kernel is named after its twin in csrc/cuda, and its arguments are named after the twin's.
# ruff: noqa: E741, N803, N806

import triton
import triton.language as tl

from .arithmetic import log_sum
from .constants import (
    EXPONENTIALS,
    LN2,
    LOG2E,
    LOGIT_SUM,
    MASKED,
    MAXIMUM,
    NO_MAXIMUM,
    OFFSET_START,
)


@triton.jit(do_not_specialize=["R", "D_UNITS", "D_TILES", "stride_units"])
def prepare_rows_kernel(
    given,  # (., D_UNITS * UNIT) of any type and strides
    taken,  # (R,) rows that are taken, -1: one of zeros; or None: as they come
    rows,  # (R, D_TILES * TILE_D) in the compute type, or None where ``given`` are such rows
    inverse,  # (R,) or None
    R,
    D_UNITS,
    D_TILES,
    stride_units,  # of the rows that are given, in UNITs
    stride_d,
    inverse_limit,  # 1 / norm of a zero row
    UNIT: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least the width
):
    """Writes rows as the other kernels read them, rounded and with zeros from D on.

    Writes 1 / |row| of the rounded row, at most ``inverse_limit``: exactly that value marks a zero
    row.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = row.to(tl.int64)
    there = row < R
    if taken is not None:
        place = tl.load(taken + row, mask=there, other=-1)
    k = tl.arange(0, BLOCK_D)[None, :]
    at = place[:, None] * (stride_units * UNIT) + k.to(tl.int64) * stride_d
    kept = (there & (place >= 0))[:, None] & (k < D_UNITS * UNIT)
    v = tl.load(given + at, mask=kept, other=0.0)
    if rows is not None:
        width = D_TILES * TILE_D
        v = v.to(rows.dtype.element_ty)
        tl.store(rows + row.to(tl.int64)[:, None] * width + k, v, mask=there[:, None] & (k < width))
    if inverse is not None:
        v = v.to(tl.float32)
        norm = tl.sqrt_rn(tl.sum(v * v, 1))
        tl.store(inverse + row, tl.minimum(1 / norm, inverse_limit), mask=there)


@triton.jit(
    do_not_specialize=["N", "D", "labels", "D_TILES", "columns", "w_stride_c", "w_stride_d"],
)
def finish_rows_kernel(
    x,  # (N, D_TILES * TILE_D)
    w,  # (., D) of any type and strides
    y,  # (N,) or (N, labels) int64, -1: no target here
    w_row,  # like y, the target's row of w
    x_inv,  # (N,)
    w_inv,  # (C,)
    partials,  # (PLANES, columns, N), see statistics_kernel
    lse,  # (N,)
    target_cosine,  # like y
    w_norm,  # like y
    logit_sum,  # (N,) or None
    logit_max,  # (N,) or None
    N,
    D,
    labels,  # of a row, None: one
    D_TILES,
    w_stride_c,
    w_stride_d,
    columns,
    NORMALIZE_W: tl.constexpr,
    LOG2_UNITS: tl.constexpr,  # of the partials: logits in units of ln 2
    ONE_VERSUS_REST: tl.constexpr,  # then all partial maxima are equal, and l is the sum
    MAXIMUM_PLANE: tl.constexpr,  # of the logits: MAXIMUM or LOGIT_MAXIMUM
    TILE_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the partial statistics of a row in a fixed order, and takes <x_i, w_y>."""
    UNIT: tl.constexpr = LN2 if LOG2_UNITS else 1.0
    TO_LOG2: tl.constexpr = 1.0 if LOG2_UNITS else LOG2E
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = columns.to(tl.int64) * N
    m = tl.full((BLOCK_N,), NO_MAXIMUM, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), NO_MAXIMUM, tl.float32)
    for start in range(0, columns, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        there = (part < columns)[:, None] & (row < N)[None, :]
        slot = partials + part.to(tl.int64)[:, None] * N + row[None, :]
        part_m = tl.load(slot + MAXIMUM * plane, mask=there, other=NO_MAXIMUM)
        part_l = tl.load(slot + EXPONENTIALS * plane, mask=there, other=0.0)
        higher = tl.maximum(m, tl.max(part_m, 0))
        l = l * tl.exp2((m - higher) * TO_LOG2)
        l += tl.sum(part_l * tl.exp2((part_m - higher[None, :]) * TO_LOG2), 0)
        m = higher
        if logit_sum is not None:
            total += tl.sum(tl.load(slot + LOGIT_SUM * plane, mask=there, other=0.0), 0)
        if logit_max is not None:
            part_top = tl.load(slot + MAXIMUM_PLANE * plane, mask=there, other=NO_MAXIMUM)
            top = tl.maximum(top, tl.max(part_top, 0))
    value = l
    if not ONE_VERSUS_REST:
        none = l == 0  # no negatives
        value = tl.where(none, float("-inf"), log_sum(m, UNIT, tl.where(none, 1.0, l)))
    tl.store(lse + row, value, mask=row < N)
    if logit_sum is not None:
        total = tl.where(total <= MASKED, float("-inf"), total * UNIT)
        tl.store(logit_sum + row, total, mask=row < N)
    if logit_max is not None:
        top = tl.where(top == NO_MAXIMUM, float("-inf"), top * UNIT)
        tl.store(logit_max + row, top, mask=row < N)

    if labels is None:
        _finish_target(
            x, w, y, w_row, x_inv, w_inv, target_cosine, w_norm, row, row, N, D, D_TILES,
            w_stride_c, w_stride_d, NORMALIZE_W, TILE_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        for l in range(labels):
            _finish_target(
                x, w, y, w_row, x_inv, w_inv, target_cosine, w_norm, row, row * labels + l, N, D,
                D_TILES, w_stride_c, w_stride_d, NORMALIZE_W, TILE_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _finish_target(
    x,
    w,
    y,
    w_row,
    x_inv,
    w_inv,
    target_cosine,
    w_norm,
    row,
    pair,  # where one target of each row stands in y
    N,
    D,
    D_TILES,
    w_stride_c,
    w_stride_d,
    NORMALIZE_W: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the cosine and the norm of a target; the arguments are those of the kernel."""
    label = tl.load(y + pair, mask=row < N, other=-1)
    owned = label >= 0
    dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    x_row = x + row.to(tl.int64)[:, None] * (D_TILES * TILE_D)
    picked = w + tl.load(w_row + pair, mask=owned, other=0)[:, None] * w_stride_c
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        there = owned[:, None] & (k < D)
        x_part = tl.load(x_row + k, mask=there, other=0.0)
        w_part = tl.load(picked + k.to(tl.int64) * w_stride_d, mask=there, other=0.0)
        dot += x_part.to(tl.float32) * w_part.to(x_part.dtype).to(tl.float32)
    q = tl.load(w_inv + label, mask=owned, other=1.0)
    cosine = tl.sum(dot, 1) * tl.load(x_inv + row, mask=row < N, other=1.0)
    if NORMALIZE_W:
        cosine *= q
    tl.store(target_cosine + pair, cosine, mask=row < N)
    tl.store(w_norm + pair, tl.where(owned, 1 / q, 0.0), mask=row < N)


@triton.jit(do_not_specialize=["N", "D_TILES"])
def saved_rows_kernel(
    x,  # (N, D_TILES * TILE_D)
    x_inv,  # (N,)
    lse,  # (N,)
    grad_lse,  # (N,)
    scale,  # ()
    row_weight,  # (N,): grad_lse exp(offset - lse)
    weighted,  # like x: unit rows times that
    N,
    D_TILES,
    TILE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least the width
):
    """Writes what turns saved exponentials into G: a weight of each row, and x times it."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < N
    offset = tl.maximum(tl.load(scale) - OFFSET_START, 0.0)
    row_lse = tl.load(lse + row, mask=there, other=0.0)
    # lse is -inf only in rows without negatives, whose exponentials are all 0
    exponent = tl.where(row_lse == float("-inf"), 0.0, offset - row_lse)
    power = exponent * LOG2E
    # what is lost of a large power, and of log2(e) itself
    rest = tl.fma(exponent, LOG2E, -power) + exponent * 1.92596303e-8
    weight = tl.load(grad_lse + row, mask=there, other=0.0) * tl.exp2(power) * tl.exp2(rest)
    tl.store(row_weight + row, weight, mask=there)
    width = D_TILES * TILE_D
    k = tl.arange(0, BLOCK_D)[None, :]
    at = row.to(tl.int64)[:, None] * width + k
    inside = there[:, None] & (k < width)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v *= tl.load(x_inv + row, mask=there, other=0.0)[:, None]
    tl.store(weighted + at, (v * weight[:, None]).to(weighted.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "D_UNITS", "labels", "D_TILES", "table_units"])
def project_kernel(
    gradient,  # (R, D_TILES * TILE_D) fp32, along the unit rows
    rows,  # (R, D_TILES * TILE_D), in the compute type
    inverse,  # (R,)
    weight,  # (R,) of a gradient that lacks 1 / |row| too, or None
    factor,  # () of the gradient, or None
    index,  # (R,) or (R, labels) row of the table, -1: none; or None: as they come
    table,  # (., D or more): rows that are added, see ROUND_TABLE
    coefficient,  # of the rows added, (R,) or (R, labels), or None
    radial,  # by row of the table: gradient of the row's norm, or None; with one label
    out,  # (R, D), or more rows with an index
    out_index,  # (R,) rows of out, or None: as they come
    R,
    D_UNITS,
    labels,  # rows of the table that a row gets, None: one
    D_TILES,
    table_units,  # its stride, in UNITs
    table_stride_d,
    inverse_limit,  # 1 / norm of a zero row
    NORMALIZE: tl.constexpr,
    ROUND_TABLE: tl.constexpr,  # to the compute type
    UNIT: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least the width
):
    """Turns the gradient along unit rows into the gradient of raw rows, in its final type.

    Removes the part along the row, which normalisation undoes, and writes 0 for a zero row. Adds
    the target's share, and the gradient that arrives through the norm.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < R
    D = D_UNITS * UNIT
    k = tl.arange(0, BLOCK_D)[None, :]
    kept = there[:, None] & (k < D)
    at = row.to(tl.int64)[:, None] * (D_TILES * TILE_D) + k
    inv = tl.load(inverse + row, mask=there, other=1.0)
    g = tl.load(gradient + at, mask=kept, other=0.0)
    v = tl.load(rows + at, mask=kept, other=0.0).to(tl.float32)
    if weight is not None:
        g *= tl.load(weight + row, mask=there, other=0.0)[:, None]
        g *= inv[:, None]
    if factor is not None:
        g *= tl.load(factor)

    table_stride = table_units * UNIT
    ROUNDED: tl.constexpr = rows.dtype.element_ty if ROUND_TABLE else table.dtype.element_ty
    if labels is None:
        picked = _picked(index, row, there)
        g += _row_of_table(
            row, picked, k, D, table, table_stride, table_stride_d, coefficient, ROUNDED
        )  # fmt: skip
    else:
        for l in range(labels):
            pair = row * labels + l
            g += _row_of_table(
                pair, _picked(index, pair, there), k, D, table, table_stride, table_stride_d,
                coefficient, ROUNDED,
            )  # fmt: skip

    radius = tl.zeros((BLOCK_R,), tl.float32)
    if NORMALIZE:
        # of the unit row: the radius of a small row itself could overflow
        radius = -tl.sum(g * v, 1) * inv
    if radial is not None:
        radius += tl.load(radial + picked, mask=picked >= 0, other=0.0)
    g = projected(g, v, inv, radius, inv >= inverse_limit, radial, NORMALIZE)
    out_row = row.to(tl.int64)
    if out_index is not None:
        out_row = tl.load(out_index + row, mask=there, other=0)
    tl.store(out + out_row[:, None] * D + k, g.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _picked(index, place, there):
    """Returns the row of the table for each place, -1: none."""
    if index is None:
        picked = tl.where(there, place.to(tl.int64), -1)
    else:
        picked = tl.load(index + place, mask=there, other=-1).to(tl.int64)
    return picked


@triton.jit
def _row_of_table(
    place,
    picked,
    k,
    D,
    table,
    stride,
    stride_d,
    coefficient,
    ROUNDED: tl.constexpr,  # the type that it is rounded to
):
    """Returns a row of the table for each place, times its coefficient; 0 where there is none."""
    added = picked >= 0
    at = picked[:, None] * stride + k.to(tl.int64) * stride_d
    t = tl.load(table + at, mask=added[:, None] & (k < D), other=0.0).to(ROUNDED).to(tl.float32)
    if coefficient is not None:
        t *= tl.load(coefficient + place, mask=added, other=0.0)[:, None]
    return t


@triton.jit
def projected(g, v, inv, radius, zero, radial, NORMALIZE: tl.constexpr):
    """Returns the gradient of raw rows v; radius is its part along the unit rows."""
    if NORMALIZE or radial is not None:
        g += tl.where(zero, 0.0, radius)[:, None] * (inv[:, None] * v)
    if NORMALIZE:
        g = tl.where(zero[:, None], 0.0, g)
    return g
