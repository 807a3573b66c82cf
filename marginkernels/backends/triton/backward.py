# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_bwd: takes G chunk by chunk from a source, and hands it to the GEMMs."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import numerics
from . import vendor_gemm
from .configs import Config
from .operands import Operands
from .row_kernels import project_kernel, target_kernel
from .tile_kernels import gradient_kernel

# a chunk of G: the GEMM that makes dx of it needs many classes to run well
G_CHUNK_BYTES = 64 << 20
# a chunk of fp32 dw, which should still be in L2 when it is projected
DW_CHUNK_BYTES = 16 << 20


class Incoming(NamedTuple):
    """Holds results of the forward sweep, and the gradients that arrive for them."""

    lse: Tensor  # (N,)
    x_inv: Tensor  # (N,)
    w_inv: Tensor  # (C,)
    grad_lse: Tensor  # (N,)
    grad_target: Tensor  # (N,)
    grad_w_norm: Tensor | None  # (N,)
    grad_sum: Tensor | None  # (N,)


def head_bwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D)
    y: Tensor,  # (N,)
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,) rows of w
    lse: Tensor,  # (N,)
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,)
    tiles: Tensor,  # (N, classes of all tiles), or (0,)
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # (N,)
    grad_w_norm: Tensor | None,  # (N,)
    grad_sum: Tensor | None,  # (N,)
    *,
    normalize_x: bool,
    normalize_w: bool,
    compute_dtype: torch.dtype,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
    need_scale: bool,
    transform: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the op of :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    all_rows = w
    w = w if index is None else w.index_select(0, index)
    operands = Operands.of(
        x, w, y, scale, bias, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
        extras=grad_sum is not None or need_scale, config=config,
    )  # fmt: skip
    incoming = Incoming(
        lse=lse.contiguous(),
        x_inv=x_inv.contiguous(),
        w_inv=w_inv.contiguous(),
        grad_lse=grad_lse.contiguous(),
        grad_target=grad_target.contiguous(),
        grad_w_norm=None if grad_w_norm is None else grad_w_norm.contiguous(),
        grad_sum=None if grad_sum is None else grad_sum.contiguous(),
    )
    dx = x.new_empty(x.shape if need_x else 0)
    dw = w.new_empty(w.shape if need_w else 0)
    dbias = operands.statistics(len(w) if need_bias else 0)
    dscale = operands.statistics(*(() if need_scale else (0,)))
    if len(x) == 0:
        dw = dw if index is None or not need_w else torch.empty_like(all_rows)
        return dx, dw.zero_(), dbias.zero_(), dscale.zero_()
    source: GradientSource
    if tiles.numel() > 0:
        source = SavedGradient(operands, incoming, tiles)
    else:
        source = TileGradient(operands, incoming, need_bias, need_scale)
    _take_gradients(operands, source, incoming, normalize_x, dx, dw, dbias)
    if need_scale:
        dscale = source.dscale.sum() / scale
    if need_w and index is not None:
        dw = torch.zeros_like(all_rows).index_copy_(0, index, dw)
    return dx, dw, dbias, dscale


def _take_gradients(
    operands: Operands,
    source: "GradientSource",
    incoming: Incoming,
    normalize_x: bool,
    dx: Tensor,  # (N, D), or (0,)
    dw: Tensor,  # (C, D), or (0,)
    dbias: Tensor,  # (C,), or (0,)
) -> None:
    """Writes the gradients from the chunks of G."""
    targets = Targets.of(operands, incoming)
    dx_raw = dw_raw = None
    if dx.numel() > 0:
        dx_raw = operands.statistics(len(operands.x), operands.width).zero_()
    for first, stop, w_chunk in operands.chunks(source.chunk_tiles):
        start, count = first * operands.config.block_c, len(w_chunk)
        g = source.next(first, stop, w_chunk)
        if dx_raw is not None:
            vendor_gemm.add_mm(dx_raw, g, w_chunk)
        if dbias.numel() > 0:
            torch.sum(source.dbias[:, :count], 0, out=dbias[start : start + count])
        if dw.numel() > 0:
            if dw_raw is None:
                dw_raw = operands.statistics(min(_dw_rows(operands), count), operands.width)
            _write_dw(operands, source, incoming, targets, start, w_chunk, g, dw_raw, dw)
    if dx_raw is not None:
        _write_dx(operands, source, incoming, targets, dx_raw, normalize_x, dx)


class GradientSource:
    """Hands out G chunk by chunk, but for factors that the results are multiplied with."""

    chunk_tiles: int  # class tiles of a chunk
    x: Tensor  # (N, width): the other operand of dw
    row_weight: Tensor | None = None  # (N,) of dx
    dx_factor: Tensor | None = None  # (N,) or ()
    dw_factor: Tensor | None = None  # ()
    dbias: Tensor  # where it is needed: (row tiles, classes of a chunk) sums for the latest chunk
    dscale: Tensor  # where it is needed: (class tiles, row tiles) parts of a sum

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        row_bytes = operands.row_tiles * operands.config.block_n * operands.x.itemsize
        self.chunk_tiles = operands.chunk_tiles(G_CHUNK_BYTES // row_bytes)

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (N, classes) of the class tiles from ``first`` to ``stop``."""
        raise NotImplementedError


class TileGradient(GradientSource):
    """Recomputes G chunk by chunk with the tile program, into one buffer.

    fp16 has too little range for G: there the buffer holds G times a power of two, which is chosen
    on the device.
    """

    def __init__(
        self, operands: Operands, incoming: Incoming, need_bias: bool, need_scale: bool
    ) -> None:
        super().__init__(operands)
        self.x = operands.x
        g_scale = None
        if operands.x.dtype == torch.float16:
            g_scale = _power_of_two(operands, incoming)
            self.dx_factor = self.dw_factor = 1 / g_scale
        row_tiles, config = operands.row_tiles, operands.config
        g_width = self.chunk_tiles * config.block_c
        self.g = operands.x.new_empty(row_tiles * config.block_n, g_width)
        if need_bias:
            self.dbias = operands.statistics(row_tiles, g_width)
        if need_scale:
            self.dscale = operands.statistics(operands.class_tiles, row_tiles)
        sums = (self.dbias if need_bias else None, self.dscale if need_scale else None)
        self.arguments = (
            operands.y, incoming.x_inv, operands.padded(incoming.w_inv), operands.scale,
            operands.bias, *operands.transform.operands, operands.flags(), incoming.lse,
            incoming.grad_lse, incoming.grad_sum, g_scale, self.g, *sums,
        )  # fmt: skip

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (N, classes) of the class tiles from ``first`` to ``stop``."""
        operands = self.operands
        gradient_kernel[(operands.row_tiles * (stop - first),)](
            operands.x, w_chunk, *self.arguments,
            N=len(operands.x), C=len(operands.w), first_tile=first,
            class_tiles=operands.class_tiles, g_tiles=self.chunk_tiles,
            TRANSFORM=operands.transform.apply, NORMALIZE_W=operands.normalize_w,
            **operands.tile_settings(),
        )  # fmt: skip
        return self.g[: len(operands.x), : len(w_chunk)]


class SavedGradient(GradientSource):
    """Hands out exp(z - offset) q_j as forward saved it, which is G but for a factor per row.

    For dw the factor is multiplied into the rows of x, for dx into the rows of the result. Where
    all cosines are near -1, row_weight is near the end of fp32's range: it only meets unit rows, or
    small sums.
    """

    def __init__(self, operands: Operands, incoming: Incoming, tiles: Tensor) -> None:
        super().__init__(operands)
        self.tiles = tiles
        offset = (operands.scale - numerics.OFFSET_START).clamp_min(0)
        # lse is -inf only in rows without negatives, whose exponentials are all 0
        exponent = torch.where(incoming.lse == -torch.inf, 0.0, offset - incoming.lse)
        self.row_weight = incoming.grad_lse * exponent.exp()
        self.dx_factor = incoming.x_inv * operands.scale
        self.dw_factor = operands.scale
        units = operands.x * incoming.x_inv[:, None]
        self.x = (units * self.row_weight[:, None]).to(operands.x.dtype)

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (N, classes) of the class tiles from ``first`` to ``stop``."""
        start = first * self.operands.config.block_c
        return self.tiles[:, start : start + len(w_chunk)]


class Targets(NamedTuple):
    """Holds the target's column of G, see target_kernel."""

    coefficient: Tensor  # (N,)
    slot: Tensor  # (C,) int32
    sums: Tensor  # (N, width)
    radial: Tensor | None  # (N,)

    @classmethod
    def of(cls, operands: Operands, incoming: Incoming) -> "Targets":
        """Computes the column."""
        n, block_d = len(operands.x), 512
        targets = cls(
            coefficient=operands.statistics(n),
            slot=operands.y.new_full((len(operands.w),), -1, dtype=torch.int32),
            sums=operands.statistics(n, operands.width),
            radial=None if incoming.grad_w_norm is None else operands.statistics(n),
        )
        target_kernel[(n, triton.cdiv(operands.width, block_d))](
            operands.x, operands.y, incoming.x_inv, incoming.w_inv, operands.scale,
            incoming.grad_target, incoming.grad_w_norm, *targets,
            N=n, NORMALIZE_W=operands.normalize_w, BLOCK_N=32, BLOCK_D=block_d,
            **operands.row_settings(),
        )  # fmt: skip
        return targets


def _projection_settings(operands: Operands) -> dict[str, Any]:
    """Returns the settings that both projections share."""
    d = operands.w.shape[1]
    return dict(
        D=d, EVEN_D=d == operands.width, inverse_limit=operands.inverse_limit, BLOCK_R=4,
        BLOCK_D=512, **operands.row_settings(),
    )  # fmt: skip


def _write_dx(
    operands: Operands,
    source: GradientSource,
    incoming: Incoming,
    targets: Targets,
    dx_raw: Tensor,  # (N, width)
    normalize_x: bool,
    dx: Tensor,  # (N, D)
) -> None:
    """Writes dx from its sum over all classes."""
    n, w = len(operands.x), operands.w
    if source.row_weight is not None:
        dx_raw *= source.row_weight[:, None]
    project_kernel[(triton.cdiv(n, 4),)](
        dx_raw, operands.x, incoming.x_inv, source.dx_factor, operands.y, w, targets.coefficient,
        None, dx,
        R=n, table_stride_r=w.stride(0), table_stride_d=w.stride(1), NORMALIZE=normalize_x,
        FACTOR_STRIDE=0 if source.dx_factor is None else source.dx_factor.dim(),
        ROUND_TABLE=True, **_projection_settings(operands),
    )  # fmt: skip


def _dw_rows(operands: Operands) -> int:
    """Returns the rows of dw that are made at once."""
    # a multiple of 64 rows keeps every part at a multiple of 16 bytes
    return max(64, DW_CHUNK_BYTES // (operands.width * 4) // 64 * 64)


def _write_dw(
    operands: Operands,
    source: GradientSource,
    incoming: Incoming,
    targets: Targets,
    first: int,  # class of the chunk
    w_chunk: Tensor,  # (classes, width)
    g: Tensor,  # (N, classes)
    dw_raw: Tensor,  # (rows of a part, width): a buffer
    dw: Tensor,  # (C, D)
) -> None:
    """Writes dw of a chunk part by part: a GEMM, then the projection while the result is in L2."""
    for start in range(0, len(w_chunk), len(dw_raw)):
        part = slice(start, start + len(dw_raw))
        rows = w_chunk[part]
        here = slice(first + start, first + start + len(rows))
        vendor_gemm.mm(dw_raw[: len(rows)], g[:, part].t(), source.x)
        project_kernel[(triton.cdiv(len(rows), 4),)](
            dw_raw, rows, incoming.w_inv[here], source.dw_factor, targets.slot[here], targets.sums,
            None, targets.radial, dw[here],
            R=len(rows), table_stride_r=operands.width, table_stride_d=1,
            NORMALIZE=operands.normalize_w, FACTOR_STRIDE=0, ROUND_TABLE=False,
            **_projection_settings(operands),
        )  # fmt: skip


def _power_of_two(operands: Operands, incoming: Incoming) -> Tensor:
    """Returns 2^k (), such that the largest entry of G times it lies in fp16's upper range.

    Zero rows, whose inverse norms mean nothing, count as 1, as they do in G.
    """
    limit, x_inv, w_inv = operands.inverse_limit, incoming.x_inv, incoming.w_inv
    magnitude = incoming.grad_lse.abs()
    if incoming.grad_sum is not None:
        magnitude = magnitude + incoming.grad_sum.abs()
    factor = torch.where(x_inv < limit, x_inv * operands.scale, 1.0)
    largest = (magnitude * factor).amax() * operands.transform.steepest
    if operands.normalize_w:
        largest = largest * torch.where(w_inv < limit, w_inv, 1.0).amax()
    # not so large that the factor of a row is infinite times it, where all of the gradient is 0
    return torch.exp2((14 - largest.log2()).floor().clamp(-126, 100))
