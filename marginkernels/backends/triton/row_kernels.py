# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the kernels that are linear in N, C D or N D: norms, targets, merges, projections.

What: everything beside the tiles, in fp32 and in a fixed order; no atomics anywhere.
Never materialised: normalised rows, one-hot labels, a second copy of dw.
Fast because: each row of x, w and dw is read or written once per sweep, by one program.
"""

# sizes and flags are capitals, as in the formulas; l is the usual name of a sum of exponentials.
# A kernel is named after its twin in csrc/cuda, and its arguments are named after the twin's.
# ruff: noqa: E741, N803, N806

import triton
import triton.language as tl

from .constants import EXPONENTIALS, LN2, LOG2E, LOGIT_SUM, MAXIMUM, NO_MAXIMUM


@triton.jit(do_not_specialize=["R", "D_UNITS", "D_TILES", "stride_units"])
def prepare_rows_kernel(
    given,  # (., D_UNITS * UNIT) of any type and strides
    index,  # (R,) rows that are taken, -1: one of zeros; or None: as they come
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
    if index is not None:
        place = tl.load(index + row, mask=there, other=-1)
    k = tl.arange(0, BLOCK_D)[None, :]
    at = place[:, None] * (stride_units * UNIT) + k.to(tl.int64) * stride_d
    taken = (there & (place >= 0))[:, None] & (k < D_UNITS * UNIT)
    v = tl.load(given + at, mask=taken, other=0.0)
    if rows is not None:
        width = D_TILES * TILE_D
        v = v.to(rows.dtype.element_ty)
        tl.store(rows + row.to(tl.int64)[:, None] * width + k, v, mask=there[:, None] & (k < width))
    if inverse is not None:
        v = v.to(tl.float32)
        norm = tl.sqrt_rn(tl.sum(v * v, 1))
        tl.store(inverse + row, tl.minimum(1 / norm, inverse_limit), mask=there)


@triton.jit(do_not_specialize=["N", "class_tiles"])
def flag_kernel(
    y,  # (N,) int64
    flags,  # (row tiles, class tiles) int8
    N,
    class_tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes 1 for the tiles that hold a target, 0 for the others: only the first need a mask."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    row_tile = tl.program_id(0) % row_tiles
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(y + row, mask=row < N, other=-1).to(tl.int32)
    tile = tl.program_id(0) // row_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    of_label = tl.where(label >= 0, label // BLOCK_C, -1)
    hit = tl.max((of_label[:, None] == tile[None, :]).to(tl.int32), 0)
    own = flags + row_tile.to(tl.int64) * class_tiles
    tl.store(own + tile, hit.to(tl.int8), mask=tile < class_tiles)


@triton.jit(
    do_not_specialize=["N", "D", "D_TILES", "columns", "w_stride_c", "w_stride_d"],
)
def finish_rows_kernel(
    x,  # (N, D_TILES * TILE_D)
    w,  # (., D) of any type and strides
    y,  # (N,) int64, -1: no target here
    w_row,  # (N,) int64, the target's row of w
    x_inv,  # (N,)
    w_inv,  # (C,)
    partials,  # (PLANES, columns, N), see statistics_kernel
    lse,  # (N,)
    target_cosine,  # (N,)
    w_norm,  # (N,)
    logit_sum,  # (N,) or None
    logit_max,  # (N,) or None
    N,
    D,
    D_TILES,
    w_stride_c,
    w_stride_d,
    columns,
    NORMALIZE_W: tl.constexpr,
    LOG2_UNITS: tl.constexpr,  # of the partials: logits in units of ln 2
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
    none = l == 0  # no negatives
    value = _log_sum(m, UNIT, tl.where(none, 1.0, l))
    tl.store(lse + row, tl.where(none, float("-inf"), value), mask=row < N)
    if logit_sum is not None:
        tl.store(logit_sum + row, total * UNIT, mask=row < N)
    if logit_max is not None:
        tl.store(logit_max + row, tl.where(none, float("-inf"), top * UNIT), mask=row < N)

    label = tl.load(y + row, mask=row < N, other=-1)
    owned = label >= 0
    dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    x_row = x + row.to(tl.int64)[:, None] * (D_TILES * TILE_D)
    picked = w + tl.load(w_row + row, mask=owned, other=0)[:, None] * w_stride_c
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
    tl.store(target_cosine + row, cosine, mask=row < N)
    tl.store(w_norm + row, tl.where(owned, 1 / q, 0.0), mask=row < N)


@triton.jit
def _log_sum(m, UNIT: tl.constexpr, l):
    """Returns m UNIT + log(l) of a normal l > 0, rounded once where it is large.

    An error of lse is a relative error of every probability, and log(l) alone may be 50.
    """
    bits = l.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    # ln 2 in two parts: the product with the first one is exact
    small = tl.fma(exponent, -2.12194440e-4, tl.log(mantissa))
    return tl.fma(exponent, 0.693359375, tl.fma(m, UNIT, small))


@triton.jit(do_not_specialize=["N", "D_TILES"])
def target_kernel(
    x,  # (N, D_TILES * TILE_D)
    y,  # (N,) int64, -1: no target here
    x_inv,  # (N,)
    w_inv,  # (C,)
    scale,  # ()
    grad_target,  # (N,)
    grad_w_norm,  # (N,) or None
    coefficient,  # (N,): weight of w_y in a row's dx
    slot,  # (C,) int32, -1 before: the row whose sums are those of a class
    sums,  # (N, D_TILES * TILE_D) fp32: the targets' part of a class's dw
    radial,  # (N,) or None: the gradient of the class's norm
    N,
    D_TILES,
    NORMALIZE_W: tl.constexpr,
    TILE_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the weight of w_y in a row's dx, and the targets' part of each class's dw.

    This is the target's column of G, in fp32, outside the GEMMs: one program per row and slice of
    D. The first row of each class adds up the parts of all rows of the class, in their order.
    """
    row = tl.program_id(0)
    label = tl.load(y + row)
    q = tl.load(w_inv + label, mask=label >= 0, other=1.0) if NORMALIZE_W else 1.0
    factor = tl.load(scale) * q
    first_slice = tl.program_id(1) == 0
    own = tl.load(grad_target + row) * tl.load(x_inv + row) * factor
    tl.store(coefficient + row, own, mask=first_slice)

    earlier = 0
    for start in range(0, row, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        same = (tl.load(y + k, mask=k < row, other=-1) == label) & (k < row)
        earlier += tl.sum(same.to(tl.int32), 0)
    if (label >= 0) & (earlier == 0):
        width = D_TILES * TILE_D
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        radial_total = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(row // BLOCK_N * BLOCK_N, N, BLOCK_N):
            k = start + tl.arange(0, BLOCK_N)
            same = tl.load(y + k, mask=k < N, other=-1) == label
            g = tl.load(grad_target + k, mask=same, other=0.0)
            g *= tl.load(x_inv + k, mask=same, other=0.0) * factor
            there = same[:, None] & (col < width)[None, :]
            x_rows = tl.load(
                x + k.to(tl.int64)[:, None] * width + col[None, :], mask=there, other=0.0
            )
            total += tl.sum(g[:, None] * x_rows.to(tl.float32), 0)
            if radial is not None:
                radial_total += tl.load(grad_w_norm + k, mask=same, other=0.0)
        tl.store(sums + row.to(tl.int64) * width + col, total, mask=col < width)
        tl.store(slot + label, row, mask=first_slice)
        if radial is not None:
            tl.store(radial + row, tl.sum(radial_total, 0), mask=first_slice)


@triton.jit(
    do_not_specialize=["R", "D", "D_TILES", "table_stride_r", "table_stride_d"],
)
def project_kernel(
    gradient,  # (R, D_TILES * TILE_D) fp32, along the unit rows
    rows,  # (R, D_TILES * TILE_D), in the compute type
    inverse,  # (R,)
    factor,  # (R,) or (): of the gradient, or None
    index,  # (R,) row of the table, -1: none
    table,  # (., D or more): rows that are added, see ROUND_TABLE
    coefficient,  # (R,) of the row added, or None
    radial,  # by row of the table: gradient of the row's norm, or None
    out,  # (R, D), or more rows with an index
    out_index,  # (R,) rows of out, or None: as they come
    R,
    D,
    D_TILES,
    table_stride_r,
    table_stride_d,
    inverse_limit,  # 1 / norm of a zero row
    NORMALIZE: tl.constexpr,
    FACTOR_STRIDE: tl.constexpr,
    ROUND_TABLE: tl.constexpr,  # to the compute type
    EVEN_D: tl.constexpr,  # D = D_TILES * TILE_D
    TILE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turns the gradient along unit rows into the gradient of raw rows, in its final type.

    Removes the part along the row, which normalisation undoes, and writes 0 for a zero row. Adds
    the target's share, and the gradient that arrives through the norm.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < R
    width = D_TILES * TILE_D
    base = row.to(tl.int64)[:, None] * width
    inv = tl.load(inverse + row, mask=there, other=1.0)
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if factor is not None:
        scale = tl.load(factor + row * FACTOR_STRIDE, mask=there, other=1.0)
    picked = tl.load(index + row, mask=there, other=-1).to(tl.int64)
    weight = tl.where(picked >= 0, 1.0, 0.0)
    if coefficient is not None:
        weight = tl.load(coefficient + row, mask=there, other=0.0)
    picked_row = table + picked[:, None] * table_stride_r

    along = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        if NORMALIZE:
            k = start + tl.arange(0, BLOCK_D)[None, :]
            g, v = _gradient_at(
                gradient, rows, base, k, there, scale, picked, picked_row, weight, D, width,
                table_stride_d, ROUND_TABLE,
            )  # fmt: skip
            along += g * v
    # of the unit row: the radius of a small row itself could overflow
    radius = -tl.sum(along, 1) * inv
    if radial is not None:
        radius += tl.load(radial + picked, mask=picked >= 0, other=0.0)
    zero = inv >= inverse_limit
    out_stride = D.to(tl.int64)
    if EVEN_D:
        out_stride = width.to(tl.int64)
    out_row = row.to(tl.int64)
    if out_index is not None:
        out_row = tl.load(out_index + row, mask=there, other=0)
    for start in range(0, width, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)[None, :]
        g, v = _gradient_at(
            gradient, rows, base, k, there, scale, picked, picked_row, weight, D, width,
            table_stride_d, ROUND_TABLE,
        )  # fmt: skip
        g = projected(g, v, inv, radius, zero, radial, NORMALIZE)
        kept = there[:, None] & (k < (width if EVEN_D else D))
        target = out + out_row[:, None] * out_stride + k
        tl.store(target, g.to(out.dtype.element_ty), mask=kept)


@triton.jit
def projected(g, v, inv, radius, zero, radial, NORMALIZE: tl.constexpr):
    """Returns slices of the gradient of raw rows v; radius is its part along the unit rows."""
    if NORMALIZE or radial is not None:
        g += tl.where(zero, 0.0, radius)[:, None] * (inv[:, None] * v)
    if NORMALIZE:
        g = tl.where(zero[:, None], 0.0, g)
    return g


@triton.jit
def _gradient_at(
    gradient, rows, base, k, there, scale, picked, picked_row, weight, D, width, table_stride_d,
    ROUND_TABLE: tl.constexpr,
):  # fmt: skip
    """Returns slices (BLOCK_R, BLOCK_D): the gradient with the target's share, and the rows."""
    inside = there[:, None] & (k < width)
    g = tl.load(gradient + base + k, mask=inside, other=0.0) * scale[:, None]
    v = tl.load(rows + base + k, mask=inside, other=0.0)
    added = (picked >= 0)[:, None] & (k < D)
    t = tl.load(picked_row + k.to(tl.int64) * table_stride_d, mask=added, other=0.0)
    t = t.to(v.dtype).to(tl.float32) if ROUND_TABLE else t.to(tl.float32)
    return g + weight[:, None] * t, v.to(tl.float32)
