# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the tile program's epilogue for the backward sweep: G, each tile from x and w.

tile_kernels.py has the tile, and says what the names mean.
"""

# sizes and flags are capitals, as in the formulas.
# A kernel is named after its twin in csrc/cuda, and its arguments are named after the twin's.
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from .arithmetic import softplus
from .constants import LOG2E
from .tile_kernels import (
    SIZES,
    exclude,
    load_of_centre,
    load_of_winner,
    only_label,
    products,
    row_factor,
)


@triton.jit
def _gradient_tile(
    index,  # of the tile in this launch, rows fastest
    x,
    w,
    y,
    x_inv,
    w_inv,
    scale,
    bias,
    row_parameter,
    constants,
    flags,
    lse,
    grad_lse,
    grad_sum,
    g_scale,
    g,
    dbias,
    dscale,
    N,
    C,
    labels,
    D_TILES,
    first_tile,
    stop_tile,
    class_tiles,
    g_tiles,
    inverse_limit,
    TRANSFORM: tl.constexpr,
    ONE_VERSUS_REST: tl.constexpr,
    NORMALIZE_W: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Computes one tile of G; the arguments are those of the kernel."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    row_tile = index % row_tiles
    tile = first_tile + index // row_tiles
    start = tile * BLOCK_C
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    v, winner, q = products(
        x, w, w_inv, row_tile * BLOCK_N, start, first_tile * BLOCK_C, N, C, D_TILES,
        NORMALIZE_W, SUB_CENTERS, BLOCK_N, BLOCK_C, BLOCK_D, PRECISION, DESCRIPTORS,
    )  # fmt: skip

    r = row_factor(x_inv, scale, row, N)
    # zero rows would claim all of fp16's range, for a gradient that is 0
    inverse = tl.load(x_inv + row, mask=row < N, other=1.0)
    fold = tl.where(inverse < inverse_limit, r, 1.0)
    if g_scale is not None:
        fold *= tl.load(g_scale)
    a = tl.load(grad_lse + row, mask=row < N, other=0.0) * fold
    # padding rows repeat the last one: an infinite lse makes their G 0
    row_lse = tl.load(lse + row, mask=row < N, other=float("inf"))
    # a row without negatives has lse = -inf, and no G either
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)

    rate = r  # the logits are v * rate, without the bias
    if TRANSFORM is not None:
        rate = tl.full((BLOCK_N,), tl.load(scale), tl.float32)
        v *= tl.where(row < N, inverse, 0.0)[:, None]
    # as early as possible: each tile that lives across the branch takes registers
    flag = flags + row_tile.to(tl.int64) * class_tiles + tile
    label = only_label(y, labels, row, N, SUB_CENTERS)
    v = exclude(v, flag, label, y, labels, row, start, N, C, SUB_CENTERS, BLOCK_C)
    if TRANSFORM is not None:
        parameter = None
        if row_parameter is not None:
            parameter = tl.load(row_parameter + row, mask=row < N, other=0.0)[:, None]
        v, slope = TRANSFORM(v, parameter, constants)
    if ONE_VERSUS_REST:
        _, p = softplus(v * rate[:, None])
    elif bias is not None:
        # with the bits that z had in the statistics: its error is an error of exp(z - lse)
        own_bias = load_of_winner(bias, start, winner, SUB_CENTERS, BLOCK_C)
        z = tl.fma(v, r[:, None], own_bias)
        p = tl.exp2((z - row_lse[:, None]) * LOG2E)
    else:
        # rounding takes several digits from the shift at a scale of 256: they go into a
        shift = row_lse * LOG2E
        rest = tl.where(row < N, tl.fma(row_lse, LOG2E, -shift), 0.0)
        a *= tl.exp2(-rest)
        p = tl.exp2(v * (rate * LOG2E)[:, None] - shift[:, None])
    G = p * a[:, None]
    if grad_sum is not None:
        u = tl.load(grad_sum + row, mask=row < N, other=0.0) * fold
        G = tl.where(v == float("-inf"), 0.0, G + u[:, None])

    unfold = 1 / fold
    g_col = start - first_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    g_stride = (g_tiles * BLOCK_C).to(tl.int64)
    if dbias is not None:
        for centre in tl.static_range(SUB_CENTERS):
            own = _of_centre(G * unfold[:, None], winner, centre, SUB_CENTERS)
            own_dbias = dbias + (row_tile * SUB_CENTERS + centre) * g_stride
            tl.store(own_dbias + g_col, tl.sum(own, 0))
    if dscale is not None:
        v = tl.where(v == float("-inf"), 0.0, v)
        total = tl.sum(tl.sum(G * v, 1) * (rate * unfold), 0)
        tl.store(dscale + tile.to(tl.int64) * row_tiles + row_tile, total)
    if TRANSFORM is not None:
        G *= slope
    in_g = tl.arange(0, BLOCK_N)[:, None] * (g_tiles * BLOCK_C) + g_col[None, :]
    for centre in tl.static_range(SUB_CENTERS):
        own = _of_centre(G, winner, centre, SUB_CENTERS)
        if NORMALIZE_W:
            if centre > 0:
                q = load_of_centre(w_inv, start, centre, SUB_CENTERS, BLOCK_C)
            own *= tl.where(q < inverse_limit, q, 1.0)[None, :]
        own_g = g + ((centre * row_tiles + row_tile) * BLOCK_N).to(tl.int64) * g_stride
        tl.store(own_g + in_g, own.to(g.dtype.element_ty))


@triton.jit
def _of_centre(G, winner, centre: tl.constexpr, SUB_CENTERS: tl.constexpr):
    """Returns G where the centre stands for its class, and else 0."""
    if SUB_CENTERS > 1:
        G = tl.where(winner == centre, G, 0.0)
    return G


@triton.jit(do_not_specialize=[*SIZES, "stop_tile", "g_tiles"])
def gradient_kernel(
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
    lse,  # (N,)
    grad_lse,  # (N,)
    grad_sum,  # (N,) or None
    g_scale,  # () power of two, or None
    g,  # (K, row tiles * BLOCK_N, g_tiles * BLOCK_C), in the compute type
    dbias,  # (row tiles, K, g_tiles * BLOCK_C) sums over the rows of a tile, or None
    dscale,  # (class tiles, row tiles) sums over a tile, or None
    N,
    C,  # classes
    labels,  # of a row, None: one
    D_TILES,
    first_tile,  # the class tiles of this launch
    stop_tile,
    class_tiles,
    g_tiles,  # width of g, in class tiles
    inverse_limit,  # 1 / norm of a zero row
    TRANSFORM: tl.constexpr,  # of cosines, see transforms.py, or None
    ONE_VERSUS_REST: tl.constexpr,  # the sums, which a transform may ask for
    NORMALIZE_W: tl.constexpr,
    SUB_CENTERS: tl.constexpr,  # K
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # x and w are tensor descriptors
    FLATTEN: tl.constexpr,  # the loops over tiles and over features are one
):
    """Computes G_ij = (a_i exp(z_ij - lse_i) + u_i) r_i q_j of the negatives, 0 at the targets.

    One versus rest a sigmoid is in the place of exp(z_ij - lse_i). With a transform, its slope is
    another factor. Of K centres the winner alone has a G that is not 0: each centre has a matrix of
    its own, whose stores are as wide as for one centre.
    """
    if FLATTEN:
        tiles = tl.cdiv(N, BLOCK_N) * (stop_tile - first_tile)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _gradient_tile(
                index, x, w, y, x_inv, w_inv, scale, bias, row_parameter, constants, flags, lse,
                grad_lse, grad_sum, g_scale, g, dbias, dscale, N, C, labels, D_TILES, first_tile,
                stop_tile, class_tiles, g_tiles, inverse_limit, TRANSFORM, ONE_VERSUS_REST,
                NORMALIZE_W, SUB_CENTERS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, DESCRIPTORS,
                FLATTEN,
            )  # fmt: skip
    else:
        index = tl.program_id(0)  # a loop would take registers
        _gradient_tile(
            index, x, w, y, x_inv, w_inv, scale, bias, row_parameter, constants, flags, lse,
            grad_lse, grad_sum, g_scale, g, dbias, dscale, N, C, labels, D_TILES, first_tile,
            stop_tile, class_tiles, g_tiles, inverse_limit, TRANSFORM, ONE_VERSUS_REST,
            NORMALIZE_W, SUB_CENTERS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, DESCRIPTORS, FLATTEN,
        )  # fmt: skip
