# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes G chunk by chunk: again with the tile program, or from what the forward sweep saved."""

from typing import NamedTuple

import torch
from torch import Tensor

from .gradient_kernels import gradient_kernel
from .operands import Operands, ceil_div
from .row_kernels import saved_rows_kernel


class Incoming(NamedTuple):
    """Holds results of the forward sweep, and the gradients that arrive for them."""

    lse: Tensor  # (N,)
    x_inv: Tensor  # (N,)
    w_inv: Tensor  # (C,)
    grad_lse: Tensor  # (N,)
    grad_target: Tensor  # (N,) or (N, L)
    grad_w_norm: Tensor | None  # likewise
    grad_sum: Tensor | None  # (N,)

    def contiguous(self) -> "Incoming":
        """Returns the tensors in the form that the kernels read."""
        given = {name: t for name, t in self._asdict().items() if t is not None}
        return self._replace(**{name: t.contiguous() for name, t in given.items()})


class GradientSource:
    """Hands out G chunk by chunk, but for factors that the results are multiplied with.

    Each of the K centres of a class has a matrix of its own, (N, classes).
    """

    chunk_tiles: int  # class tiles of a chunk
    x: Tensor  # (N, width): the other operand of dw
    row_weight: Tensor | None = None  # (N,) of dx, where it lacks 1 / |x_i| too
    dx_factor: Tensor | None = None  # ()
    dw_factor: Tensor | None = None  # ()
    dbias: Tensor  # where it is needed: (row tiles, K, classes of a chunk) sums of the latest chunk
    dscale: Tensor  # where it is needed: (class tiles, row tiles) parts of a sum

    def __init__(self, operands: Operands, row_bytes: int) -> None:
        self.operands = operands
        self.chunk_tiles = operands.chunk_tiles(row_bytes)

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (K, N, classes) of the class tiles from ``first`` to ``stop``."""
        raise NotImplementedError


class TileGradient(GradientSource):
    """Recomputes G chunk by chunk with the tile program, into one buffer. Sets ``slot`` to -1.

    fp16 has too little range for G: there the buffer holds G times a power of two, which is chosen
    on the device.
    """

    def __init__(
        self,
        operands: Operands,
        incoming: Incoming,
        dw_bytes: int,  # of a row of w, in a buffer
        slot: Tensor,  # (C,) int32, see Targets
        need_bias: bool,
        need_scale: bool,
    ) -> None:
        row_tiles, config = operands.row_tiles, operands.config
        g_bytes = row_tiles * config.block_n * operands.x.itemsize
        super().__init__(operands, g_bytes + dw_bytes)
        self.x = operands.x
        g_scale = None
        if operands.x.dtype == torch.float16:
            g_scale = _power_of_two(operands, incoming)
            self.dx_factor = self.dw_factor = 1 / g_scale
        centers, g_width = operands.sub_centers, self.chunk_tiles * config.block_c
        self.g = operands.x.new_empty(centers, row_tiles * config.block_n, g_width)
        if need_bias:
            self.dbias = operands.statistics(row_tiles, centers, g_width)
        if need_scale:
            self.dscale = operands.statistics(operands.class_tiles, row_tiles)
        sums = (self.dbias if need_bias else None, self.dscale if need_scale else None)
        self.arguments = (
            operands.y, incoming.x_inv, operands.to_last_tile(incoming.w_inv), operands.scale,
            operands.bias, *operands.transform.operands, operands.flags(slot), incoming.lse,
            incoming.grad_lse, incoming.grad_sum, g_scale,
            self.g, *sums,
        )  # fmt: skip

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (K, N, classes) of the class tiles from ``first`` to ``stop``."""
        operands = self.operands
        programs = operands.row_tiles * (stop - first)
        if operands.config.flatten:
            programs = min(programs, operands.programs)
        gradient_kernel[(programs,)](
            *operands.factors(w_chunk), *self.arguments,
            N=len(operands.x), C=operands.classes, first_tile=first, stop_tile=stop,
            class_tiles=operands.class_tiles, g_tiles=self.chunk_tiles,
            **operands.tile_settings(),
        )  # fmt: skip
        return self.g[:, : len(operands.x), : len(w_chunk) // operands.sub_centers]


class SavedGradient(GradientSource):
    """Hands out exp(z - offset) q_j as forward saved it, which is G but for a factor per row.

    For dw the factor is multiplied into the rows of x, for dx into the rows of the result. Where
    all cosines are near -1, row_weight is near the end of fp32's range: it only meets unit rows, or
    small sums. Sets ``slot`` to -1.
    """

    def __init__(
        self, operands: Operands, incoming: Incoming, tiles: Tensor, dw_bytes: int, slot: Tensor
    ) -> None:
        super().__init__(operands, dw_bytes)
        slot.fill_(-1)
        self.tiles = tiles
        self.row_weight = torch.empty_like(incoming.lse)
        self.dx_factor = self.dw_factor = operands.scale
        self.x = torch.empty_like(operands.x)
        settings = operands.held_rows
        saved_rows_kernel[(ceil_div(len(operands.x), settings["BLOCK_R"]),)](
            operands.x, incoming.x_inv, incoming.lse, incoming.grad_lse, operands.scale,
            self.row_weight, self.x, N=len(operands.x), **settings,
        )  # fmt: skip

    def next(self, first: int, stop: int, w_chunk: Tensor) -> Tensor:
        """Returns G (K, N, classes) of the class tiles from ``first`` to ``stop``."""
        start = first * self.operands.config.block_c
        return self.tiles[None, :, start : start + len(w_chunk)]


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
