# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_bwd: takes G chunk by chunk from a source, and hands it to the GEMMs.

step.py makes the same sweep, with an update of w in the place of dw.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import vendor_gemm
from .configs import Config
from .operands import Operands
from .row_kernels import project_kernel, target_kernel
from .sources import GradientSource, Incoming, SavedGradient, TileGradient

# a chunk of fp32 dw, which should still be in L2 when it is projected
DW_CHUNK_BYTES = 16 << 20

# takes dw of some classes before its projection: their places in the sweep, their rows, the sums
TakeRows = Callable[[slice, Tensor, Tensor], None]


def head_bwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index
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
    operands = Operands.of(
        x, w, y, scale, bias, index, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
        extras=grad_sum is not None or need_scale, config=config,
    )  # fmt: skip
    dx = x.new_empty(x.shape if need_x else 0)
    dw = w.new_empty(w.shape if need_w else 0)
    dbias = operands.statistics(operands.classes if need_bias else 0)
    dscale = operands.statistics(*(() if need_scale else (0,)))
    if len(x) == 0:
        return dx, dw.zero_(), dbias.zero_(), dscale.zero_()
    if index is not None:
        dw.zero_()
    incoming = Incoming(
        lse, x_inv, w_inv, grad_lse, grad_target, grad_w_norm, grad_sum
    ).contiguous()
    sweep = BackwardSweep.of(operands, incoming, tiles, need_bias, need_scale)
    dx_raw = sweep.run(need_x, dbias, functools.partial(_write_dw, sweep, dw) if need_w else None)
    if dx_raw is not None:
        sweep.write_dx(dx_raw, w, operands.target_row(), normalize_x, dx)
    return dx, dw, dbias, sweep.scale_gradient() if need_scale else dscale


def _write_dw(sweep: "BackwardSweep", dw: Tensor, part: slice, rows: Tensor, raw: Tensor) -> None:
    """Projects dw of some classes while the result of the GEMM is in L2."""
    operands, targets = sweep.operands, sweep.targets
    out, out_index = (dw[part], None) if operands.index is None else (dw, operands.index[part])
    project_kernel[(triton.cdiv(len(rows), 4),)](
        raw, rows, sweep.incoming.w_inv[part], sweep.source.dw_factor, targets.slot[part],
        targets.sums, None, targets.radial, out, out_index,
        R=len(rows), table_stride_r=operands.width, table_stride_d=1,
        NORMALIZE=operands.normalize_w, FACTOR_STRIDE=0, ROUND_TABLE=False,
        **_projection_settings(operands),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BackwardSweep:
    """Holds what one backward pass over the classes needs."""

    operands: Operands
    incoming: Incoming
    source: GradientSource
    targets: "Targets"

    @classmethod
    def of(
        cls,
        operands: Operands,
        incoming: Incoming,
        tiles: Tensor,  # (N, classes of all tiles), or (0,)
        need_bias: bool,
        need_scale: bool,
    ) -> "BackwardSweep":
        """Chooses where G comes from, and computes the targets' column."""
        source: GradientSource
        if tiles.numel() > 0:
            source = SavedGradient(operands, incoming, tiles)
        else:
            source = TileGradient(operands, incoming, need_bias, need_scale)
        return cls(operands, incoming, source, Targets.of(operands, incoming))

    def run(
        self,
        need_x: bool,
        dbias: Tensor,  # (C,) to be written, or (0,)
        take: TakeRows | None,
    ) -> Tensor | None:
        """Goes over the classes, and returns dx (N, width) before its projection.

        A class has been added to dx before ``take`` gets its rows.
        """
        operands, source = self.operands, self.source
        dx_raw = dw_raw = None
        if need_x:
            dx_raw = operands.statistics(len(operands.x), operands.width).zero_()
        for first, stop, w_chunk in operands.chunks(source.chunk_tiles):
            start, count = first * operands.config.block_c, len(w_chunk)
            g = source.next(first, stop, w_chunk)
            if dx_raw is not None:
                vendor_gemm.add_mm(dx_raw, g, w_chunk)
            if dbias.numel() > 0:
                torch.sum(source.dbias[:, :count], 0, out=dbias[start : start + count])
            if take is not None:
                if dw_raw is None:
                    dw_raw = operands.statistics(min(_dw_rows(operands), count), operands.width)
                self._take_chunk(start, w_chunk, g, dw_raw, take)
        return dx_raw

    def scale_gradient(self) -> Tensor:
        """Returns the gradient of the scale, ()."""
        return self.source.dscale.sum() / self.operands.scale

    def _take_chunk(
        self,
        first: int,  # class of the chunk
        w_chunk: Tensor,  # (classes, width)
        g: Tensor,  # (N, classes)
        dw_raw: Tensor,  # (rows of a part, width): a buffer
        take: TakeRows,
    ) -> None:
        """Makes dw of a chunk part by part, so that what takes it finds it in L2."""
        for start in range(0, len(w_chunk), len(dw_raw)):
            part = slice(start, start + len(dw_raw))
            rows = w_chunk[part]
            raw = dw_raw[: len(rows)]
            vendor_gemm.mm(raw, g[:, part].t(), self.source.x)
            take(slice(first + start, first + start + len(rows)), rows, raw)

    def write_dx(
        self,
        dx_raw: Tensor,  # (N, width)
        table: Tensor,  # (., D) the rows of w that hold targets
        target_row: Tensor,  # (N,) a row of the table, or -1
        normalize_x: bool,
        dx: Tensor,  # (N, D)
    ) -> None:
        """Writes dx from its sum over all classes."""
        operands, source = self.operands, self.source
        n = len(operands.x)
        if source.row_weight is not None:
            dx_raw *= source.row_weight[:, None]
        project_kernel[(triton.cdiv(n, 4),)](
            dx_raw, operands.x, self.incoming.x_inv, source.dx_factor, target_row, table,
            self.targets.coefficient, None, dx, None,
            R=n, table_stride_r=table.stride(0), table_stride_d=table.stride(1),
            NORMALIZE=normalize_x,
            FACTOR_STRIDE=0 if source.dx_factor is None else source.dx_factor.dim(),
            ROUND_TABLE=True, **_projection_settings(operands),
        )  # fmt: skip


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
            slot=operands.y.new_full((operands.classes,), -1, dtype=torch.int32),
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


def _dw_rows(operands: Operands) -> int:
    """Returns the rows of dw that are made at once."""
    # a multiple of 64 rows keeps every part at a multiple of 16 bytes
    return max(64, DW_CHUNK_BYTES // (operands.width * 4) // 64 * 64)
