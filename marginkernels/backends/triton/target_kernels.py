# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the kernels of the targets: which tiles hold them, and their column of G.

What: flags of tiles, the weight of each target's row in dx, and the targets' part of dw.
Never materialised: one-hot labels, a sort of the labels of a batch of the usual size.
Fast because: a tile without targets reads one byte; a class is added up by one program, in order.
"""

# sizes and flags are capitals, as in the formulas; l is a label of a row.
# A kernel is named after its twin in csrc/cuda, and its arguments are named after the twin's.
# ruff: noqa: E741, N803, N806

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "C", "labels", "class_tiles"])
def flag_kernel(
    y,  # (N,) or (N, labels) int64
    flags,  # (row tiles, class tiles) int8
    slot,  # (C,) int32, or None: set to -1 for target_kernel
    N,
    C,  # rows of w
    labels,  # of a row, None: one
    class_tiles,
    SUB_CENTERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes 0 for the tiles that hold no target: only the others need a mask.

    Bit l mod 8 says that label l of one of the tile's rows lies there.
    """
    row_tiles = tl.cdiv(N, BLOCK_N)
    row_tile = tl.program_id(0) % row_tiles
    first = tl.program_id(0) // row_tiles * BLOCK_T
    ROWS: tl.constexpr = BLOCK_C * SUB_CENTERS  # of w in a tile
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = first + tl.arange(0, BLOCK_T)
    if labels is None:
        bits = _holds_label(y + row, row < N, tile, ROWS)
    else:
        bits = tl.zeros((BLOCK_T,), tl.int32)
        for l in range(labels):
            bits |= _holds_label(y + row * labels + l, row < N, tile, ROWS) << (l % 8)
    own = flags + row_tile.to(tl.int64) * class_tiles
    tl.store(own + tile, bits.to(tl.int8), mask=tile < class_tiles)
    if slot is not None:
        for part in tl.static_range(SUB_CENTERS):
            col = first * ROWS + part * BLOCK_T * BLOCK_C + tl.arange(0, BLOCK_T * BLOCK_C)
            tl.store(slot + col, -1, mask=col < tl.where(row_tile == 0, C, 0))


@triton.jit
def read_labels(y, there):
    """Returns the rows of w that targets name, -1 where there is none."""
    return tl.load(y, mask=there, other=-1).to(tl.int32)


@triton.jit
def _holds_label(y, there, tile, ROWS: tl.constexpr):
    """Returns 1 for the tiles that hold one of the labels, and else 0."""
    label = read_labels(y, there)
    of_label = tl.where(label >= 0, label // ROWS, -1)
    return tl.max((of_label[:, None] == tile[None, :]).to(tl.int32), 0)


@triton.jit(do_not_specialize=["N", "labels", "D_TILES"])
def target_kernel(
    x,  # (N / labels, D_TILES * TILE_D)
    y,  # (N,) int64, -1: no target here; sorted where there is an order
    order,  # (N,) pairs in the order of y, or None: as they come
    x_inv,  # (N / labels,)
    w_inv,  # (C,)
    scale,  # ()
    grad_target,  # (N,)
    grad_w_norm,  # (N,) or None
    coefficient,  # (N,): weight of w_y in a row's dx, 0 without a target
    slot,  # (C,) int32, -1 before: the pair whose sums are those of a class
    sums,  # (N, D_TILES * TILE_D) fp32: the targets' part of a class's dw
    radial,  # (N,) or None: the gradient of the class's norm
    N,  # pairs of a row and a target
    labels,  # of a row, None: one
    D_TILES,
    NORMALIZE_W: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # pairs that are added together
    BLOCK_D: tl.constexpr,
):
    """Writes the weight of w_y in a row's dx, and the targets' part of each class's dw.

    This is the target's column of G, in fp32, outside the GEMMs: one program per place in y and
    slice of D. The first pair of each class adds up the parts of all pairs of the class, in their
    order.
    """
    BLOCK_N: tl.constexpr = GROUPS * GROUP
    place = tl.program_id(0)
    label = tl.load(y + place)
    first_slice = tl.program_id(1) == 0
    pair = place.to(tl.int64) if order is None else tl.load(order + place)
    if label < 0:
        tl.store(coefficient + pair, 0.0, mask=first_slice)
    else:
        factor = tl.load(scale)
        if NORMALIZE_W:
            factor *= tl.load(w_inv + label)
        row = pair if labels is None else pair // labels
        own = tl.load(grad_target + pair) * tl.load(x_inv + row) * factor
        tl.store(coefficient + pair, own, mask=first_slice)

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
                    pairs = k.to(tl.int64) if order is None else tl.load(order + k, mask=same)
                    rows = pairs if labels is None else pairs // labels
                    g = tl.load(grad_target + pairs, mask=same, other=0.0)
                    g *= tl.load(x_inv + rows, mask=same, other=0.0) * factor
                    there = same[:, None] & (col < width)[None, :]
                    x_rows = tl.load(x + rows[:, None] * width + col[None, :], there, other=0.0)
                    total += tl.sum(g[:, None] * x_rows.to(tl.float32), 0)
                    if radial is not None:
                        radial_total += tl.load(grad_w_norm + pairs, mask=same, other=0.0)
                    left = tl.where(left > nearest, left, GROUPS)
                    nearest = tl.min(left)
                start += BLOCK_N
                if order is not None:
                    goes_on = tl.load(y + start, mask=start < N, other=-1) == label
                    start = tl.where(goes_on, start, N)
            tl.store(sums + pair * width + col, total, mask=col < width)
            tl.store(slot + label, pair.to(tl.int32), mask=first_slice)
            if radial is not None:
                tl.store(radial + pair, tl.sum(radial_total, 0), mask=first_slice)
