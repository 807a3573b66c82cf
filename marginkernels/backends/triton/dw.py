# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes dw of a chunk of G, and hands it on to what projects it or updates w with it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import vendor_gemm
from .operands import Operands
from .sources import GradientSource

# takes a chunk: the place of its first row of w in the sweep, its rows, and G (K, N, classes)
TakeChunk = Callable[[int, Tensor, Tensor], None]


class RowGradient(NamedTuple):
    """Holds what dw is made of, but for G and the rows of w; see target_kernel."""

    operands: Operands
    w_inv: Tensor  # (C,)
    source: GradientSource
    slot: Tensor  # (C,) int32
    sums: Tensor  # (N L, width)
    radial: Tensor | None  # (N L,)


class TakeDw:
    """Makes dw of a chunk, in fp32 and before its projection, and takes it."""

    def __init__(self, gradient: RowGradient) -> None:
        self.gradient = gradient
        self.buffer: Tensor | None = None  # (classes of a chunk, width)

    def __call__(self, first: int, w_chunk: Tensor, g: Tensor) -> None:
        """Takes a chunk, see :data:`TakeChunk`."""
        part = slice(first, first + len(w_chunk))
        raw = self.place(part)
        for centre, out in enumerate(self.gradient.operands.by_centre(raw)):
            vendor_gemm.mm(out, g[centre].t(), self.gradient.source.x)
        self.take(part, w_chunk, raw)

    def place(self, part: slice) -> Tensor:
        """Returns where the GEMM writes dw of some classes, (classes, width) fp32."""
        operands, count = self.gradient.operands, part.stop - part.start
        if self.buffer is None:
            self.buffer = operands.statistics(count, operands.width)
        return self.buffer[:count]

    def take(self, part: slice, rows: Tensor, raw: Tensor) -> None:
        """Takes dw before its projection: the places of classes in the sweep, rows, the GEMM."""
        raise NotImplementedError


class WriteDw(TakeDw):
    """Projects dw, and writes it in its final type."""

    def __init__(self, gradient: RowGradient, dw: Tensor) -> None:
        super().__init__(gradient)
        self.dw = dw  # (C, D), or more rows with an index

    def place(self, part: slice) -> Tensor:
        """Returns the rows of dw itself where they can hold the GEMM's result, else a buffer."""
        return self.dw[part] if is_raw(self.gradient.operands, self.dw) else super().place(part)

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


def is_raw(operands: Operands, dw: Tensor) -> bool:
    """Says whether the GEMM can write into dw, which is then projected in place."""
    return dw.dtype == torch.float32 and operands.index is None and dw.shape[1] == operands.width
