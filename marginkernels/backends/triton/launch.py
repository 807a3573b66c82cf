# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The two ops: which kernel runs on which part of the operands, in which order.

Nothing here reads a number from the device, and grids depend on shapes alone: both ops can be
captured in a CUDA graph.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import numerics
from . import configs, gemm
from .row_kernels import finish_rows_kernel, project_kernel, target_kernel
from .sweep import Sweep
from .tile_kernels import gradient_kernel, statistics_kernel
from .transforms import Transform

# a chunk of G: the GEMM that makes dx of it needs many classes to run well
G_CHUNK_BYTES = 64 << 20
# a chunk of fp32 dw: it should still be in L2 when it is projected
DW_CHUNK_BYTES = 16 << 20


def head_fwd(
    x, w, y, scale, bias, *, normalize_x, normalize_w, compute_dtype, save_tiles, want_sum,
    want_max, transform, row_parameter, constants, config=None,
):  # fmt: skip
    """See :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    (n, d), c = x.shape, len(w)
    transform = Transform.of(transform, row_parameter, constants, n, bias is not None)
    load = configs.load(transform.apply, bias is not None, save_tiles, want_sum)
    sweep = Sweep.of(x, w, compute_dtype, numerics.least_norm(compute_dtype), load, config)
    separate_max = want_max and (save_tiles or transform.apply is not None)
    block_c = sweep.config.block_c
    y, bias = y.contiguous(), sweep.padded(bias)

    def stat(*size):
        return x.new_empty(size, dtype=torch.float32)

    lse, target, w_norm = stat(n), stat(n), stat(n)
    logit_sum, logit_max = stat(n if want_sum else 0), stat(n if want_max else 0)
    tiles = stat(0)
    if save_tiles:
        tiles = x.new_empty(configs.tiles_shape(n, c), dtype=compute_dtype)
    x_inv = stat(n).fill_(1)
    if normalize_x and n:
        sweep.inverse_norms(sweep.x, x_inv)
    w_inv = stat(sweep.class_tiles * block_c)
    flags = sweep.flags(y) if n else None
    columns = _columns(sweep)
    partials = stat(4, columns, n)

    for first, stop, w_chunk in sweep.chunks(sweep.chunk_tiles(len(w_inv))):
        sweep.inverse_norms(w_chunk, w_inv[first * block_c : stop * block_c])
        if n:
            statistics_kernel[(sweep.row_tiles * columns,)](
                sweep.x, w_chunk, y, x_inv, w_inv, scale, bias, *transform.operands, flags,
                partials, tiles if save_tiles else None,
                N=n, C=c, first_tile=first, stop_tile=stop, flags_stride=sweep.class_tiles,
                columns=columns, carry=int(first > 0), tiles_stride=tiles.shape[-1] // block_c,
                TRANSFORM=transform.apply, NORMALIZE_W=normalize_w, SAVE_TILES=save_tiles,
                WANT_SUM=want_sum, SEPARATE_MAX=separate_max, **sweep.tile_settings(),
            )  # fmt: skip
    w_inv = w_inv[:c]
    if n:
        finish_rows_kernel[(triton.cdiv(n, 4),)](
            sweep.x, w, y, x_inv, w_inv, partials, lse, target, w_norm,
            logit_sum if want_sum else None, logit_max if want_max else None,
            N=n, D=d, w_stride_c=w.stride(0), w_stride_d=w.stride(1), columns=columns,
            NORMALIZE_W=normalize_w, LOG2_UNITS=bias is None,
            MAX_PLANE=3 if separate_max else 0,
            BLOCK_N=4, BLOCK_P=64, BLOCK_D=256, **sweep.row_settings(),
        )  # fmt: skip
    if want_sum and bias is not None:  # the kernel takes a class that its bias masks for left out
        masked = bias == -torch.inf
        others = masked.sum() - torch.where(y >= 0, masked[y.clamp_min(0)].long(), 0)
        logit_sum.masked_fill_(others > 0, -torch.inf)
    return lse, target, w_norm, logit_sum, logit_max, x_inv, w_inv, tiles


def head_bwd(
    x, w, y, scale, bias, lse, x_inv, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum, *,
    normalize_x, normalize_w, compute_dtype, need_x, need_w, need_bias, need_scale,
    transform, row_parameter, constants, config=None,
):  # fmt: skip
    """See :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    (n, d), c = x.shape, len(w)
    transform = Transform.of(transform, row_parameter, constants, n, bias is not None)
    load = configs.load(transform.apply, bias is not None, grad_sum is not None, need_scale)
    sweep = Sweep.of(x, w, compute_dtype, numerics.least_norm(compute_dtype), load, config)
    y, lse, x_inv, w_inv, grad_lse, grad_target = (
        t.contiguous() for t in (y, lse, x_inv, w_inv, grad_lse, grad_target)
    )
    grad_w_norm, grad_sum = (None if t is None else t.contiguous() for t in (grad_w_norm, grad_sum))

    def stat(*size):
        return x.new_empty(size, dtype=torch.float32)

    dx = x.new_empty(x.shape if need_x else 0)
    dw = w.new_empty(w.shape if need_w else 0)
    dbias = stat(c if need_bias else 0)
    dscale = stat(*(() if need_scale else (0,)))
    if n == 0:
        return dx, dw.zero_(), dbias.zero_(), dscale.zero_()

    targets = _targets(sweep, y, x_inv, w_inv, scale, grad_target, grad_w_norm, normalize_w)
    g_rows = sweep.row_tiles * sweep.config.block_n
    chunk_tiles = sweep.chunk_tiles(G_CHUNK_BYTES // (g_rows * compute_dtype.itemsize))
    if tiles.numel() > 0:
        source = SavedTiles(sweep, tiles, scale, lse, x_inv, grad_lse)
    else:
        source = GradientTiles(
            sweep, y, scale, bias, transform, lse, x_inv, w_inv, grad_lse, grad_sum,
            normalize_w, need_bias, need_scale, chunk_tiles,
        )  # fmt: skip

    dw_raw = None
    dx_raw = stat(n, sweep.width).zero_() if need_x else None
    projection = dict(
        D=d, EVEN_D=d == sweep.width, inverse_limit=sweep.inverse_limit, BLOCK_R=4, BLOCK_D=512,
        **sweep.row_settings(),
    )  # fmt: skip
    for first, stop, w_chunk in sweep.chunks(chunk_tiles):
        start = first * sweep.config.block_c
        g = source.chunk(first, stop, w_chunk)
        if need_x:
            gemm.add_mm(dx_raw, g, w_chunk)
        if need_bias:
            sums = source.dbias[:, : len(w_chunk)]
            torch.sum(sums, 0, out=dbias[start : start + len(w_chunk)])
        for part in _dw_parts(sweep, len(w_chunk) if need_w else 0):
            rows, here = w_chunk[part], slice(start + part.start, start + part.stop)
            dw_raw = stat(len(rows), sweep.width) if dw_raw is None else dw_raw
            gemm.mm(g[:, part].t(), source.x, dw_raw[: len(rows)])
            project_kernel[(triton.cdiv(len(rows), 4),)](
                dw_raw, rows, w_inv[here], source.dw_factor, targets.slot[here],
                targets.gathered, None, targets.radial, dw[here],
                R=len(rows), table_stride_r=sweep.width, table_stride_d=1,
                NORMALIZE=normalize_w, FACTOR_STRIDE=0, ROUND_TABLE=False, **projection,
            )  # fmt: skip
    if need_x:
        if source.row_weight is not None:
            dx_raw *= source.row_weight[:, None]
        project_kernel[(triton.cdiv(n, 4),)](
            dx_raw, sweep.x, x_inv, source.dx_factor, y, w, targets.coefficient, None, dx,
            R=n, table_stride_r=w.stride(0), table_stride_d=w.stride(1),
            NORMALIZE=normalize_x, FACTOR_STRIDE=source.dx_factor_stride, ROUND_TABLE=True,
            **projection,
        )  # fmt: skip
    if need_scale:
        dscale = source.dscale.sum() / scale
    return dx, dw, dbias, dscale


class GradientTiles:
    """G (N, classes), recomputed chunk by chunk into one buffer.

    fp16 has too little range for G: there it is G times a power of two, chosen on the device.
    """

    row_weight = None
    dx_factor_stride = 0

    def __init__(
        self, sweep, y, scale, bias, transform, lse, x_inv, w_inv, grad_lse, grad_sum,
        normalize_w, need_bias, need_scale, chunk_tiles,
    ):  # fmt: skip
        self.sweep, self.x, self.chunk_tiles = sweep, sweep.x, chunk_tiles
        g_scale = None
        if sweep.x.dtype == torch.float16:
            g_scale = _power_of_two(
                sweep, scale, x_inv, w_inv if normalize_w else None, grad_lse, grad_sum,
                transform.steepest,
            )  # fmt: skip
        self.dx_factor = self.dw_factor = None if g_scale is None else 1 / g_scale
        row_tiles, block_c = sweep.row_tiles, sweep.config.block_c
        g_width = chunk_tiles * block_c
        self.g = sweep.x.new_empty(row_tiles * sweep.config.block_n, g_width)
        self.dbias = lse.new_empty(row_tiles, g_width) if need_bias else None
        self.dscale = lse.new_empty(sweep.class_tiles, row_tiles) if need_scale else None
        self.operands = (
            y, x_inv, sweep.padded(w_inv), scale, sweep.padded(bias), *transform.operands,
            sweep.flags(y), lse, grad_lse, grad_sum, g_scale, self.g, self.dbias, self.dscale,
        )  # fmt: skip
        self.compiled = dict(TRANSFORM=transform.apply, NORMALIZE_W=normalize_w)

    def chunk(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        sweep = self.sweep
        gradient_kernel[(sweep.row_tiles * (stop - first),)](
            sweep.x, w_chunk, *self.operands,
            N=len(sweep.x), C=len(sweep.w), first_tile=first, flags_stride=sweep.class_tiles,
            g_tiles=self.chunk_tiles, **self.compiled, **sweep.tile_settings(),
        )  # fmt: skip
        return self.g[: len(sweep.x), : len(w_chunk)]


class SavedTiles:
    """exp(z - offset) q_j as forward kept it: G but for a factor per row.

    It goes into the rows of x for dw, and into those of the result for dx. Where all cosines are
    near -1, row_weight is near the end of fp32's range: it only meets unit rows, or small sums.
    """

    dx_factor_stride = 1

    def __init__(self, sweep, tiles, scale, lse, x_inv, grad_lse):
        self.sweep, self.tiles = sweep, tiles
        offset = (scale - 59).clamp_min(0)
        # lse is -inf only in rows without negatives, whose exponentials are all 0
        exponent = torch.where(lse == -torch.inf, 0.0, offset - lse)
        self.row_weight = grad_lse * exponent.exp()
        self.dw_factor, self.dx_factor = scale, x_inv * scale
        self.x = (sweep.x * x_inv[:, None] * self.row_weight[:, None]).to(sweep.x.dtype)

    def chunk(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        start = first * self.sweep.config.block_c
        return self.tiles[:, start : start + len(w_chunk)]


class Targets(NamedTuple):
    """The target column of G, see target_kernel."""

    coefficient: Tensor
    slot: Tensor
    gathered: Tensor
    radial: Tensor | None


def _targets(sweep, y, x_inv, w_inv, scale, grad_target, grad_w_norm, normalize_w) -> Targets:
    n, block_d = len(sweep.x), 512
    targets = Targets(
        coefficient=torch.empty_like(x_inv),
        slot=y.new_full((len(sweep.w),), -1, dtype=torch.int32),
        gathered=x_inv.new_empty(n, sweep.width),
        radial=None if grad_w_norm is None else torch.empty_like(x_inv),
    )
    target_kernel[(n, triton.cdiv(sweep.width, block_d))](
        sweep.x, y, x_inv, w_inv, scale, grad_target, grad_w_norm, *targets,
        N=n, NORMALIZE_W=normalize_w, BLOCK_N=32, BLOCK_D=block_d, **sweep.row_settings(),
    )  # fmt: skip
    return targets


def _columns(sweep: Sweep) -> int:
    """Programs per row tile of the forward sweep: together they fill the device once."""
    slots = sweep.target.multiprocessors * sweep.config.ctas
    return max(1, min(slots // max(sweep.row_tiles, 1), sweep.class_tiles))


def _dw_parts(sweep: Sweep, classes: int) -> Iterator[slice]:
    # a multiple of 64 rows keeps every part at a multiple of 16 bytes
    most = max(64, DW_CHUNK_BYTES // (sweep.width * 4) // 64 * 64)
    for start in range(0, classes, most):
        yield slice(start, min(start + most, classes))


def _power_of_two(sweep, scale, x_inv, w_inv, grad_lse, grad_sum, steepest) -> Tensor:
    """2^k (), such that the largest entry of G times it lies in fp16's upper range.

    Zero rows, whose inverse norms say nothing, count as 1, as they do in G.
    """
    limit = sweep.inverse_limit
    magnitude = grad_lse.abs() if grad_sum is None else grad_lse.abs() + grad_sum.abs()
    largest = (magnitude * torch.where(x_inv < limit, x_inv * scale, 1.0)).amax() * steepest
    if w_inv is not None:
        largest = largest * torch.where(w_inv < limit, w_inv, 1.0).amax()
    # not so large that the factor of a row is infinite times it, where all of the gradient is 0
    return torch.exp2((14 - largest.log2()).floor().clamp(-126, 100))
