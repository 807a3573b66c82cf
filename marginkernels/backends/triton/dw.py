# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes dw of a chunk of G part by part, and hands each part on while it is in L2."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import vendor_gemm
from .operands import Operands
from .sources import GradientSource

# a chunk of fp32 dw, which should still be in L2 when it is projected
DW_CHUNK_BYTES = 16 << 20

# takes a chunk: the place of its first class in the sweep, its rows of w, and G (N, classes)
TakeChunk = Callable[[int, Tensor, Tensor], None]


class RowGradient(NamedTuple):
    """Holds what dw is made of, but for G and the rows of w; see target_kernel."""

    operands: Operands
    w_inv: Tensor  # (C,)
    source: GradientSource
    slot: Tensor  # (C,) int32
    sums: Tensor  # (N, width)
    radial: Tensor | None  # (N,)


class TakeDw:
    """Makes dw of a chunk part by part, so that what takes it finds it in L2."""

    def __init__(self, gradient: RowGradient) -> None:
        self.gradient = gradient
        self.buffer: Tensor | None = None  # (rows of a part, width)

    def __call__(self, first: int, w_chunk: Tensor, g: Tensor) -> None:
        """Takes a chunk, see :data:`TakeChunk`."""
        operands = self.gradient.operands
        if self.buffer is None:
            count = min(_dw_rows(operands), len(w_chunk))
            self.buffer = operands.statistics(count, operands.width)
        for start in range(0, len(w_chunk), len(self.buffer)):
            part = slice(start, start + len(self.buffer))
            rows = w_chunk[part]
            raw = self.buffer[: len(rows)]
            vendor_gemm.mm(raw, g[:, part].t(), self.gradient.source.x)
            self.take(slice(first + start, first + start + len(rows)), rows, raw)

    def take(self, part: slice, rows: Tensor, raw: Tensor) -> None:
        """Takes dw before its projection: the places of classes in the sweep, rows, the GEMM."""
        raise NotImplementedError


class WriteDw(TakeDw):
    """Projects dw, and writes it in its final type."""

    def __init__(self, gradient: RowGradient, dw: Tensor) -> None:
        super().__init__(gradient)
        self.dw = dw  # (C, D), or more rows with an index

    def take(self, part: slice, rows: Tensor, raw: Tensor) -> None:
        """Projects dw of some classes."""
        gradient, operands = self.gradient, self.gradient.operands
        out, out_index = self.dw, None
        if operands.index is None:
            out = out[part]
        else:
            out_index = operands.index[part]
        operands.project(
            raw, rows, gradient.w_inv[part], None, gradient.source.dw_factor, gradient.slot[part],
            gradient.sums, None, gradient.radial, out, out_index,
            NORMALIZE=operands.normalize_w, ROUND_TABLE=False,
        )  # fmt: skip


def _dw_rows(operands: Operands) -> int:
    """Returns the rows of dw that are made at once."""
    # a multiple of 64 rows keeps every part at a multiple of 16 bytes
    return max(64, DW_CHUNK_BYTES // (operands.width * 4) // 64 * 64)
