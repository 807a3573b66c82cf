# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_bwd: takes G chunk by chunk from a source, and hands it to the GEMMs.

step.py makes the same sweep, with an update of w in the place of dw.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, vendor_gemm
from .configs import Config
from .dw import RowGradient, TakeChunk, WriteDw, is_raw
from .operands import Operands, ceil_div
from .sources import GradientSource, Incoming, SavedGradient, TileGradient
from .target_kernels import target_kernel

# labels of a batch that every program reads, to find those of its class. On an H200 that took
# 122 us for 8192 rows, and 155 with a sort of the labels before, but it grows with the square
MOST_SCANNED = 16384
# groups of rows whose labels are read together
LABEL_GROUPS = 64


def head_bwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index
    y: Tensor,  # (N,) or (N, L)
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,) rows of w
    lse: Tensor,  # (N,)
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,)
    tiles: Tensor,  # (N, classes of all tiles), or (0,)
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # as y
    grad_w_norm: Tensor | None,  # as y
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
    w_rounded: Tensor | None = None,  # (C, D)
    sub_centers: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the op of :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    operands = Operands.of(
        x, w, y, scale, bias, index, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
        sub_centers=sub_centers, config=config, w_rounded=w_rounded, load=configs.load(
            "gradient", transform, sub_centers,
            extras=bias is not None or grad_sum is not None or need_scale or y.numel() > len(x),
        ),
    )  # fmt: skip
    dx = x.new_empty(x.shape if need_x else 0)
    dw = w.new_empty(w.shape if need_w else 0)
    dbias = operands.statistics(operands.count if need_bias else 0)
    dscale = operands.statistics(*(() if need_scale else (0,)))
    if len(x) == 0:
        return dx, dw.zero_(), dbias.zero_(), dscale.zero_()
    if index is not None:
        dw.zero_()
    incoming = Incoming(
        lse, x_inv, w_inv, grad_lse, grad_target, grad_w_norm, grad_sum
    ).contiguous()
    dw_bytes = 4 * operands.width if need_w and not is_raw(operands, dw) else 0
    sweep = BackwardSweep.of(operands, incoming, tiles, dw_bytes, need_bias, need_scale)
    dx_raw = sweep.run(need_x, dbias, WriteDw(sweep.of_rows(), dw) if need_w else None)
    if dx_raw is not None:
        sweep.write_dx(dx_raw, *operands.target_table(), normalize_x, dx)
    return dx, dw, dbias, sweep.scale_gradient() if need_scale else dscale


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
        dw_bytes: int,  # of a row of w, in a buffer
        need_bias: bool,
        need_scale: bool,
    ) -> "BackwardSweep":
        """Chooses where G comes from, and computes the targets' column."""
        source: GradientSource
        slot = operands.y.new_empty(operands.count, dtype=torch.int32)
        if tiles.numel() > 0:
            source = SavedGradient(operands, incoming, tiles, dw_bytes, slot)
        else:
            source = TileGradient(operands, incoming, dw_bytes, slot, need_bias, need_scale)
        return cls(operands, incoming, source, Targets.of(operands, incoming, slot))

    def run(
        self,
        need_x: bool,
        dbias: Tensor,  # (C,) to be written, or (0,)
        take: TakeChunk | None,
    ) -> Tensor | None:
        """Goes over the classes, and returns dx (N, width) before its projection.

        A class has been added to dx before ``take`` gets its chunk.
        """
        operands, source = self.operands, self.source
        dx_raw = None
        if need_x:
            dx_raw = operands.statistics(len(operands.x), operands.width)
            if operands.classes == 0:
                dx_raw.zero_()
        for first, stop, w_chunk in operands.chunks(source.chunk_tiles):
            start = first * operands.tile_rows
            g = source.next(first, stop, w_chunk)
            if dx_raw is not None:
                for centre, rows in enumerate(operands.by_centre(w_chunk)):
                    product = vendor_gemm.add_mm if first or centre else vendor_gemm.mm
                    product(dx_raw, g[centre], rows)
            if dbias.numel() > 0:
                own_dbias = operands.by_centre(dbias[start : start + len(w_chunk)])
                for centre, out in enumerate(own_dbias):
                    torch.sum(source.dbias[:, centre, : len(out)], 0, out=out)
            if take is not None:
                take(start, w_chunk, g)
        return dx_raw

    def of_rows(self) -> RowGradient:
        """Returns what dw is made of, but for G and the rows of w."""
        targets = self.targets
        return RowGradient(
            self.operands, self.incoming.w_inv, self.source, targets.slot, targets.sums,
            targets.radial,
        )  # fmt: skip

    def scale_gradient(self) -> Tensor:
        """Returns the gradient of the scale, ()."""
        return self.source.dscale.sum() / self.operands.scale

    def write_dx(
        self,
        dx_raw: Tensor,  # (N, width)
        table: Tensor,  # (., D or more) the rows of w that hold targets
        target_row: Tensor | None,  # (N L,) a row of the table, or -1; None: each its own
        normalize_x: bool,
        dx: Tensor,  # (N, D)
    ) -> None:
        """Writes dx from its sum over all classes."""
        operands, source = self.operands, self.source
        operands.project(
            dx_raw, operands.x, self.incoming.x_inv, source.row_weight, source.dx_factor,
            target_row, table, self.targets.coefficient, None, dx, None,
            labels=operands.labels, NORMALIZE=normalize_x, ROUND_TABLE=True,
        )  # fmt: skip


class Targets(NamedTuple):
    """Holds the target's column of G, see target_kernel."""

    coefficient: Tensor  # (N L,)
    slot: Tensor  # (C,) int32: a row of the sums, or -1
    sums: Tensor  # (N L, width)
    radial: Tensor | None  # (N L,)

    @classmethod
    def of(cls, operands: Operands, incoming: Incoming, slot: Tensor) -> "Targets":
        """Computes the column; ``slot`` is -1 everywhere."""
        n, block_d = len(operands.y), 512
        targets = cls(
            coefficient=operands.statistics(n),
            slot=slot,
            sums=operands.statistics(n, operands.width),
            radial=None if incoming.grad_w_norm is None else operands.statistics(n),
        )
        y, order = operands.y, None
        if n > MOST_SCANNED:
            y, order = torch.sort(y, stable=True)
        target_kernel[(n, ceil_div(operands.width, block_d))](
            operands.x, y, order, incoming.x_inv, incoming.w_inv, operands.scale,
            incoming.grad_target, incoming.grad_w_norm, *targets,
            N=n, labels=operands.labels, NORMALIZE_W=operands.normalize_w,
            GROUPS=LABEL_GROUPS, GROUP=16, BLOCK_D=block_d, **operands.row_settings(),
        )  # fmt: skip
        return targets
