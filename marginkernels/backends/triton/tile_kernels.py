# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the tile program: a rows x classes tile of logits, and the epilogue for statistics.

What: the forward sweep's softmax statistics; gradient_kernels.py has the backward sweep's G.
Never materialised: the (N, C) logits, a normalised copy of w, a mask; only G, chunk by chunk.
Fast because: tensor cores accumulate in fp32; on sm_90 six to eight instructions per logit follow.

Names, as in csrc/cuda/tile.cuh:

    i, j         a row of x, and a class
    K            rows of w of a class, its sub-centres: SUB_CENTERS
    winner       the centre, of K, that stands for a class: the one with the greatest v, times q
    r            row factor, scale / |x_i|, or scale where x is not normalised
    q            1 / |w_j|, or 1 where w is not normalised
    v            <x_i, w_j>, the winner's; then, as the same tile, times q, a cosine, the
                 transformed cosine
    excluded     pairs that take no part: a row's targets, and classes from C on; their v is -inf
    rate         factor of a row that turns v into a logit
    unit         of logits: ln 2, so that an exponential is a bare exp2, or 1
    z, slope     the logit, after the transform where there is one; d value / d cosine
    offset       constant in the place of m where exponentials are saved
    term         exp(z - m), or softplus(z) one versus rest
    m, l         running maximum of z, and sum of the terms
    total, top   sum of z, or of p one versus rest, and maximum of the logits before the transform
    p            exp(z - lse), or sigmoid(z) one versus rest
    a, u         grad_lse and grad_sum of a row, here times fold: G = (a p + u) slope q
    fold         r as G has it: 1 for a zero row; in fp16 times a power of two
    shift        lse of a row in units of ln 2
"""

# sizes and flags are capitals, as in the formulas; l is the usual name of a sum of exponentials.
# A kernel is named after its twin in csrc/cuda, and its arguments are named after the twin's.
# ruff: noqa: E741, N803, N806

import triton
import triton.language as tl

from .arithmetic import softplus
from .constants import (
    EXPONENTIALS,
    LOG2E,
    LOGIT_MAXIMUM,
    LOGIT_SUM,
    MASKED,
    MAXIMUM,
    NO_MAXIMUM,
    OFFSET_START,
)
from .target_kernels import read_labels

SIZES = ["N", "C", "labels", "D_TILES", "first_tile", "class_tiles"]


@triton.jit
def dot(
    x,  # (N, D_TILES * BLOCK_D)
    w,  # (classes K, D_TILES * BLOCK_D), as a descriptor (classes, K * D_TILES * BLOCK_D)
    row,  # the tile's first
    col,  # the tile's first
    centre,  # of each class
    N,
    classes,
    D_TILES,
    SUB_CENTERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Returns <x_i, w_j> (BLOCK_N, BLOCK_C) in fp32.

    The caller pads rows to a multiple of BLOCK_D, so that nothing in here is masked and every copy
    is 16 bytes wide. Beyond the last row is the last row again, or 0 with descriptors.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if DESCRIPTORS:
        for step in range(D_TILES):
            x_tile = x.load([row, step * BLOCK_D])
            w_tile = w.load([col, (centre * D_TILES + step) * BLOCK_D])
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
    else:
        stride = D_TILES * BLOCK_D
        k = tl.arange(0, BLOCK_D)
        rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - row)
        cols = tl.minimum(tl.arange(0, BLOCK_C), classes - 1 - col)
        x_offs = rows[:, None] * stride + k[None, :]
        w_offs = cols[None, :] * (SUB_CENTERS * stride) + k[:, None]
        x += row.to(tl.int64) * stride
        w += (col.to(tl.int64) * SUB_CENTERS + centre) * stride
        for _ in range(D_TILES):
            acc = tl.dot(tl.load(x + x_offs), tl.load(w + w_offs), acc, input_precision=PRECISION)
            x += BLOCK_D
            w += BLOCK_D
    return acc


@triton.jit
def products(
    x,
    w,
    w_inv,
    row,  # the tile's first
    start,  # the tile's first class
    first,  # class of w
    N,
    C,
    D_TILES,
    NORMALIZE_W: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Returns v, times q; the winner of each; and q of the first centres.

    The first of equal centres wins.
    """
    q = tl.full((BLOCK_C,), 1.0, tl.float32)
    v = dot(
        x, w, row, start - first, 0, N, C - first, D_TILES, SUB_CENTERS, BLOCK_N, BLOCK_C, BLOCK_D,
        PRECISION, DESCRIPTORS,
    )  # fmt: skip
    if NORMALIZE_W:
        q = load_of_centre(w_inv, start, 0, SUB_CENTERS, BLOCK_C)
        v *= q[None, :]
    winner = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
    for centre in tl.static_range(1, SUB_CENTERS):
        other = dot(
            x, w, row, start - first, centre, N, C - first, D_TILES, SUB_CENTERS, BLOCK_N, BLOCK_C,
            BLOCK_D, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        if NORMALIZE_W:
            other *= load_of_centre(w_inv, start, centre, SUB_CENTERS, BLOCK_C)[None, :]
        wins = other > v
        v = tl.where(wins, other, v)
        winner = tl.where(wins, centre, winner)
    return v, winner, q


@triton.jit
def load_of_centre(
    values,  # (C K,)
    start,  # the tile's first class
    centre: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loads what one centre of each class of a tile has, (BLOCK_C,)."""
    return tl.load(values + (start + tl.arange(0, BLOCK_C)) * SUB_CENTERS + centre)


@triton.jit
def load_of_winner(values, start, winner, SUB_CENTERS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Loads what the winners of a tile have, (BLOCK_N, BLOCK_C), or (1, BLOCK_C) for one centre."""
    value = load_of_centre(values, start, 0, SUB_CENTERS, BLOCK_C)[None, :]
    for centre in tl.static_range(1, SUB_CENTERS):
        other = load_of_centre(values, start, centre, SUB_CENTERS, BLOCK_C)[None, :]
        value = tl.where(winner == centre, other, value)
    return value


@triton.jit
def row_factor(x_inv, scale, row, N):
    """Returns r. It is positive in padding rows too, since an excluded logit is -inf times this."""
    return tl.load(x_inv + row, mask=row < N, other=1.0) * tl.load(scale)


@triton.jit
def only_label(y, labels, row, N, SUB_CENTERS: tl.constexpr):
    """Returns the class of each row's label; None where rows have several."""
    label = None
    if labels is None:
        label = _load_class(y + row, row < N, SUB_CENTERS)
    return label


@triton.jit
def _load_class(y, there, SUB_CENTERS: tl.constexpr):
    """Loads the classes of targets, -1 where there is none."""
    label = read_labels(y, there)
    if SUB_CENTERS > 1:
        label = tl.where(label < 0, label, label // SUB_CENTERS)
    return label


@triton.jit
def exclude(
    v,
    flag,
    label,
    y,
    labels,
    row,
    start,
    N,
    C,
    SUB_CENTERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sets the excluded to -inf. Only flagged tiles and the last one pay for it.

    Of several labels a tile looks at those whose bit is set in its flag.
    """
    col = start + tl.arange(0, BLOCK_C)
    bits = tl.load(flag)
    if (bits != 0) | (start + BLOCK_C > C):
        if labels is None:
            excluded = (label[:, None] == col[None, :]) | (col >= C)[None, :]
            v = tl.where(excluded, float("-inf"), v)
        else:
            v = tl.where((col >= C)[None, :], float("-inf"), v)
            for l in range(labels):
                if (bits.to(tl.int32) >> (l % 8)) & 1 != 0:
                    own = _load_class(y + row * labels + l, row < N, SUB_CENTERS)
                    v = tl.where(own[:, None] == col[None, :], float("-inf"), v)
    return v


@triton.jit(do_not_specialize=[*SIZES, "stop_tile", "columns", "carry", "tiles_stride"])
def statistics_kernel(
    x,  # (N, D_TILES * BLOCK_D)
    w,  # ((stop_tile - first_tile) * BLOCK_C K, D_TILES * BLOCK_D): the classes of this launch
    y,  # (N,) or (N, labels) int64, -1: no target here
    x_inv,  # (N,)
    w_inv,  # (C K,) and on to the end of the last tile
    scale,  # ()
    bias,  # (C K,) and on to the end of the last tile, or None
    row_parameter,  # (N,) of the transform, or None
    constants,  # of the transform, or None
    flags,  # (row tiles, class tiles) int8, see flag_kernel
    partials,  # (PLANES, columns, N), see constants.py
    tiles,  # (N, class tiles * BLOCK_C) exp(z - offset) q_j, or None
    N,
    C,  # classes
    labels,  # of a row, None: one
    D_TILES,
    first_tile,  # the class tiles of this launch
    stop_tile,
    class_tiles,
    columns,  # programs per row tile
    carry,  # 1: continue from the partials of the launch before, 0: start
    tiles_stride,  # width of the saved tiles, in class tiles
    inverse_limit,  # 1 / norm of a zero row
    TRANSFORM: tl.constexpr,  # of cosines, see transforms.py, or None
    ONE_VERSUS_REST: tl.constexpr,  # the sums, which a transform may ask for
    NORMALIZE_W: tl.constexpr,
    SUB_CENTERS: tl.constexpr,  # K
    SAVE_TILES: tl.constexpr,  # not with several centres
    WANT_SUM: tl.constexpr,
    SEPARATE_MAX: tl.constexpr,  # of the logits, where exponentials are not relative to it
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # x and w are tensor descriptors
    FLATTEN: tl.constexpr,  # the loops over tiles and over features are one
):
    """Takes softmax statistics of the negatives in a row tile and every ``columns``-th class tile.

    Logits are in units of ln 2 where the row factor can take that in: an exponential is then one
    FFMA and one EX2. With a bias logits are plain, which keeps the digits of a large bias, and so
    are they one versus rest.
    """
    PER_UNIT: tl.constexpr = LOG2E if bias is None and not ONE_VERSUS_REST else 1.0  # 1 / unit
    TO_LOG2: tl.constexpr = 1.0 if bias is None else LOG2E
    # row tiles vary fastest: programs that run together share their tile of w in L2
    row_tiles = tl.cdiv(N, BLOCK_N)
    row_tile = tl.program_id(0) % row_tiles
    column = tl.program_id(0) // row_tiles
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    label = only_label(y, labels, row, N, SUB_CENTERS)
    if TRANSFORM is None:
        r = row_factor(x_inv, scale, row, N) * PER_UNIT
    else:
        # cosines are 0 in padding rows
        inverse = tl.load(x_inv + row, mask=row < N, other=0.0)[:, None]
        r = tl.full((BLOCK_N,), tl.load(scale) * PER_UNIT, tl.float32)
        parameter = None
        if row_parameter is not None:
            parameter = tl.load(row_parameter + row, mask=row < N, other=0.0)[:, None]

    slot = partials + column.to(tl.int64) * N + row
    plane = columns.to(tl.int64) * N
    resume = row < N * carry  # nothing is loaded where carry is 0
    if SAVE_TILES:
        # both sides are normalised and s < 73: exp(z - offset) neither overflows nor vanishes
        offset = tl.maximum(tl.load(scale) - OFFSET_START, 0.0) * LOG2E
        m = tl.zeros((BLOCK_N,), tl.float32) + offset
    else:
        m = tl.load(slot + MAXIMUM * plane, mask=resume, other=NO_MAXIMUM)
    l = tl.load(slot + EXPONENTIALS * plane, mask=resume, other=0.0)
    if WANT_SUM:
        total = tl.load(slot + LOGIT_SUM * plane, mask=resume, other=0.0)
    if SEPARATE_MAX:
        top = tl.load(slot + LOGIT_MAXIMUM * plane, mask=resume, other=NO_MAXIMUM)

    for tile in tl.range(first_tile + column, stop_tile, columns, flatten=FLATTEN):
        start = tile * BLOCK_C
        col = start + tl.arange(0, BLOCK_C)
        v, winner, q = products(
            x, w, w_inv, row_tile * BLOCK_N, start, first_tile * BLOCK_C, N, C, D_TILES,
            NORMALIZE_W, SUB_CENTERS, BLOCK_N, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        rate = r  # the logits are v * rate
        if bias is not None:
            own_bias = load_of_winner(bias, start, winner, SUB_CENTERS, BLOCK_C)
            v = tl.fma(v, rate[:, None], tl.maximum(own_bias, MASKED))
            rate = 1.0
        if TRANSFORM is not None:
            v *= inverse
        flag = flags + row_tile.to(tl.int64) * class_tiles + tile
        v = exclude(v, flag, label, y, labels, row, start, N, C, SUB_CENTERS, BLOCK_C)
        if SEPARATE_MAX:
            top = tl.maximum(top, tl.max(v, 1) * rate)
        if TRANSFORM is not None:
            v, _ = TRANSFORM(v, parameter, constants)
        if WANT_SUM and not ONE_VERSUS_REST:
            total += tl.sum(tl.where(v == float("-inf"), 0.0, v), 1) * rate
        if ONE_VERSUS_REST:
            term, p = softplus(v * rate[:, None])
            if WANT_SUM:
                total += tl.sum(p, 1)
        elif SAVE_TILES:
            term = tl.exp2(v * rate[:, None] - offset)
            row64 = row.to(tl.int64)[:, None] * (tiles_stride * BLOCK_C)
            q = tl.where(q < inverse_limit, q, 1.0)
            stored = (term * q[None, :]).to(tiles.dtype.element_ty)
            tl.store(tiles + row64 + col[None, :], stored, mask=(row < N)[:, None])
        else:
            # a constant factor may be taken out of the maximum, a row at a time
            higher = tl.maximum(m, tl.max(v, 1) * rate)
            z = v if bias is not None else v * rate[:, None]
            term = tl.exp2((z - higher[:, None]) * TO_LOG2)
            l *= tl.exp2((m - higher) * TO_LOG2)
            m = higher
        l += tl.sum(term, 1)

    tl.store(slot + MAXIMUM * plane, m, mask=row < N)
    tl.store(slot + EXPONENTIALS * plane, l, mask=row < N)
    if WANT_SUM:
        tl.store(slot + LOGIT_SUM * plane, total, mask=row < N)
    if SEPARATE_MAX:
        tl.store(slot + LOGIT_MAXIMUM * plane, top, mask=row < N)
