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

from .constants import EXPONENTIALS, LN2, LOG2E, LOGIT_SUM, MAXIMUM, NO_MAXIMUM, OFFSET_START


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


@triton.jit(do_not_specialize=["N", "C", "class_tiles"])
def flag_kernel(
    y,  # (N,) int64
    flags,  # (row tiles, class tiles) int8
    slot,  # (C,) int32, or None: set to -1 for target_kernel
    N,
    C,
    class_tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes 1 for the tiles that hold a target, 0 for the others: only the first need a mask."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    row_tile = tl.program_id(0) % row_tiles
    first = tl.program_id(0) // row_tiles * BLOCK_T
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(y + row, mask=row < N, other=-1).to(tl.int32)
    tile = first + tl.arange(0, BLOCK_T)
    of_label = tl.where(label >= 0, label // BLOCK_C, -1)
    hit = tl.max((of_label[:, None] == tile[None, :]).to(tl.int32), 0)
    own = flags + row_tile.to(tl.int64) * class_tiles
    tl.store(own + tile, hit.to(tl.int8), mask=tile < class_tiles)
    if slot is not None:
        col = first * BLOCK_C + tl.arange(0, BLOCK_T * BLOCK_C)
        tl.store(slot + col, -1, mask=col < tl.where(row_tile == 0, C, 0))


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
    y,  # (N,) int64, -1: no target here; sorted where there is an order
    order,  # (N,) rows in the order of y, or None: as they come
    x_inv,  # (N,)
    w_inv,  # (C,)
    scale,  # ()
    grad_target,  # (N,)
    grad_w_norm,  # (N,) or None
    coefficient,  # (N,): weight of w_y in a row's dx, 0 without a target
    slot,  # (C,) int32, -1 before: the row whose sums are those of a class
    sums,  # (N, D_TILES * TILE_D) fp32: the targets' part of a class's dw
    radial,  # (N,) or None: the gradient of the class's norm
    N,
    D_TILES,
    NORMALIZE_W: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # rows that are added together
    BLOCK_D: tl.constexpr,
):
    """Writes the weight of w_y in a row's dx, and the targets' part of each class's dw.

    This is the target's column of G, in fp32, outside the GEMMs: one program per place in y and
    slice of D. The first row of each class adds up the parts of all rows of the class, in their
    order.
    """
    BLOCK_N: tl.constexpr = GROUPS * GROUP
    place = tl.program_id(0)
    label = tl.load(y + place)
    first_slice = tl.program_id(1) == 0
    row = place.to(tl.int64) if order is None else tl.load(order + place)
    if label < 0:
        tl.store(coefficient + row, 0.0, mask=first_slice)
    else:
        factor = tl.load(scale)
        if NORMALIZE_W:
            factor *= tl.load(w_inv + label)
        own = tl.load(grad_target + row) * tl.load(x_inv + row) * factor
        tl.store(coefficient + row, own, mask=first_slice)

        earlier = 0
        if order is None:
            for start in range(0, place, BLOCK_N):
                k = start + tl.arange(0, BLOCK_N)
                earlier += tl.max((tl.load(y + k, mask=k < place, other=-1) == label).to(tl.int32))
        else:
            earlier = (tl.load(y + place - 1, mask=place > 0, other=-1) == label).to(tl.int32)
        if earlier == 0:
            width = D_TILES * TILE_D
            col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            group = tl.arange(0, GROUPS)
            member = tl.arange(0, GROUP)
            total = tl.zeros((BLOCK_D,), tl.float32)
            radial_total = tl.zeros((GROUP,), tl.float32)
            start = place // GROUP * GROUP
            while start < N:
                block = start + group[:, None] * GROUP + member[None, :]
                hit = tl.load(y + block, mask=block < N, other=-1) == label
                left = tl.where(tl.max(hit.to(tl.int32), 1) > 0, group, GROUPS)
                nearest = tl.min(left)
                while nearest < GROUPS:
                    k = start + nearest * GROUP + member
                    same = tl.load(y + k, mask=k < N, other=-1) == label
                    rows = k.to(tl.int64) if order is None else tl.load(order + k, mask=same)
                    g = tl.load(grad_target + rows, mask=same, other=0.0)
                    g *= tl.load(x_inv + rows, mask=same, other=0.0) * factor
                    there = same[:, None] & (col < width)[None, :]
                    x_rows = tl.load(x + rows[:, None] * width + col[None, :], there, other=0.0)
                    total += tl.sum(g[:, None] * x_rows.to(tl.float32), 0)
                    if radial is not None:
                        radial_total += tl.load(grad_w_norm + rows, mask=same, other=0.0)
                    left = tl.where(left > nearest, left, GROUPS)
                    nearest = tl.min(left)
                start += BLOCK_N
                if order is not None:
                    goes_on = tl.load(y + start, mask=start < N, other=-1) == label
                    start = tl.where(goes_on, start, N)
            tl.store(sums + row * width + col, total, mask=col < width)
            tl.store(slot + label, row.to(tl.int32), mask=first_slice)
            if radial is not None:
                tl.store(radial + row, tl.sum(radial_total, 0), mask=first_slice)


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


@triton.jit(do_not_specialize=["R", "D_UNITS", "D_TILES", "table_units"])
def project_kernel(
    gradient,  # (R, D_TILES * TILE_D) fp32, along the unit rows
    rows,  # (R, D_TILES * TILE_D), in the compute type
    inverse,  # (R,)
    weight,  # (R,) of a gradient that lacks 1 / |row| too, or None
    factor,  # () of the gradient, or None
    index,  # (R,) row of the table, -1: none; or None: as they come
    table,  # (., D or more): rows that are added, see ROUND_TABLE
    coefficient,  # (R,) of the row added, or None
    radial,  # by row of the table: gradient of the row's norm, or None
    out,  # (R, D), or more rows with an index
    out_index,  # (R,) rows of out, or None: as they come
    R,
    D_UNITS,
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

    picked = row.to(tl.int64)
    if index is not None:
        picked = tl.load(index + row, mask=there, other=-1).to(tl.int64)
    added = there & (picked >= 0)
    in_table = picked[:, None] * (table_units * UNIT) + k.to(tl.int64) * table_stride_d
    t = tl.load(table + in_table, mask=added[:, None] & (k < D), other=0.0)
    if ROUND_TABLE:
        t = t.to(rows.dtype.element_ty)
    t = t.to(tl.float32)
    if coefficient is not None:
        t *= tl.load(coefficient + row, mask=added, other=0.0)[:, None]
    g += t

    radius = tl.zeros((BLOCK_R,), tl.float32)
    if NORMALIZE:
        # of the unit row: the radius of a small row itself could overflow
        radius = -tl.sum(g * v, 1) * inv
    if radial is not None:
        radius += tl.load(radial + picked, mask=added, other=0.0)
    g = projected(g, v, inv, radius, inv >= inverse_limit, radial, NORMALIZE)
    out_row = row.to(tl.int64)
    if out_index is not None:
        out_row = tl.load(out_index + row, mask=there, other=0)
    tl.store(out + out_row[:, None] * D + k, g.to(out.dtype.element_ty), mask=kept)


@triton.jit
def projected(g, v, inv, radius, zero, radial, NORMALIZE: tl.constexpr):
    """Returns the gradient of raw rows v; radius is its part along the unit rows."""
    if NORMALIZE or radial is not None:
        g += tl.where(zero, 0.0, radius)[:, None] * (inv[:, None] * v)
    if NORMALIZE:
        g = tl.where(zero[:, None], 0.0, g)
    return g
