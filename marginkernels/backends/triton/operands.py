# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the operands of both sweeps as the kernels read them, and hands out w chunk by chunk.

Nothing here reads a number from the device, and launches depend on shapes alone: all ops can be
captured in a CUDA graph.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ... import numerics
from . import configs
from .configs import Config
from .row_kernels import flag_kernel, norm_kernel
from .transforms import Transform

# a class is an int32 in the kernels, up to the end of the last tile; offsets have 64 bits
MOST_CLASSES = 2**31 - 1024
# a chunk of w rounded to the compute type
W_CHUNK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Operands:
    """Holds the operands of one pass over the classes, and the tiles that it is cut into.

    Rows are ``width`` numbers wide for the kernels: D up to a multiple of the tile's, zeros from D
    on. So no load in the main loop has a mask, and every row starts at a multiple of 16 bytes for
    any D.
    """

    config: Config
    target: configs.Target
    precision: str  # of tl.dot
    inverse_limit: float  # 1 / norm of a zero row
    width: int
    x: Tensor  # (N, width) in the compute type
    w: Tensor  # (C, D) as the caller gave it, or more rows with an index
    w_is_readable: bool  # without a copy
    y: Tensor  # (N,)
    scale: Tensor  # ()
    bias: Tensor | None  # (C,) continued to the end of the last tile
    index: Tensor | None  # (C,) rows of w that are swept; w then has more than C
    transform: Transform
    normalize_w: bool

    @classmethod
    def of(
        cls,
        x: Tensor,  # (N, D)
        w: Tensor,  # (C, D)
        y: Tensor,  # (N,)
        scale: Tensor,  # ()
        bias: Tensor | None,  # (C,)
        index: Tensor | None,  # (C,)
        *,
        normalize_w: bool,
        compute_dtype: torch.dtype,
        transform: str,
        row_parameter: Tensor | None,  # (N,)
        constants: Tensor | None,  # (K,)
        extras: bool,  # whether more than plain statistics and gradients is asked for
        config: Config | None,  # in the place of the table's
    ) -> "Operands":
        """Checks the operands, chooses tiles, and brings x into the form that the kernels read."""
        functor = Transform.of(transform, row_parameter, constants, len(x), bias is not None)
        classes = len(w if index is None else index)
        if classes >= MOST_CLASSES:
            raise ValueError(f"w: expected fewer than {MOST_CLASSES} classes, got {classes}")
        target = configs.target(x.device)
        kind = configs.kind(compute_dtype, target.name)
        load = configs.load(functor.apply, bias is not None, extras)
        config = config or configs.choose(target.name, kind, load, len(x))
        width = triton.cdiv(x.shape[1], config.block_d) * config.block_d
        if not _is_readable(x, width, compute_dtype):
            x = _copy_rows(x.new_zeros(len(x), width, dtype=compute_dtype), x)
        return cls(
            config=config,
            target=target,
            precision="tf32" if kind == "tf32" else "ieee",
            inverse_limit=1 / numerics.least_norm(compute_dtype),
            width=width,
            x=x,
            w=w,
            w_is_readable=index is None and _is_readable(w, width, compute_dtype),
            y=y.contiguous(),
            scale=scale,
            bias=None if bias is None else _padded(bias, config.block_c),
            index=None if index is None else index.contiguous(),
            transform=functor,
            normalize_w=normalize_w,
        )

    @property
    def classes(self) -> int:
        """Counts the classes that are swept."""
        return len(self.w if self.index is None else self.index)

    @property
    def row_tiles(self) -> int:
        """Counts the row tiles."""
        return triton.cdiv(len(self.x), self.config.block_n)

    @property
    def class_tiles(self) -> int:
        """Counts the class tiles."""
        return triton.cdiv(self.classes, self.config.block_c)

    @property
    def d_tiles(self) -> int:
        """Counts the steps of the tile program's main loop."""
        return self.width // self.config.block_d

    def statistics(self, *size: int) -> Tensor:
        """Allocates fp32 numbers on the device."""
        return self.x.new_empty(size, dtype=torch.float32)

    def columns(self) -> int:
        """Returns the programs per row tile, which together fill the device once."""
        slots = self.target.multiprocessors * self.config.ctas
        return max(1, min(slots // max(self.row_tiles, 1), self.class_tiles))

    def chunk_tiles(self, classes: int) -> int:
        """Returns the class tiles in a chunk of at most ``classes``.

        A chunk has fewer where w has to be rounded first.
        """
        if not self.w_is_readable:
            classes = min(classes, W_CHUNK_BYTES // (self.width * self.x.itemsize))
        return min(max(1, classes // self.config.block_c), self.class_tiles)

    def chunks(self, tiles: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (first tile, stop tile, rows of w as the kernels read them), ``tiles`` at a time.

        A w of another type, width or layout is rounded chunk by chunk into one buffer, and so are
        the rows of an index.
        """
        block = self.config.block_c
        if not self.w_is_readable:
            buffer = self.x.new_zeros(min(tiles * block, self.classes), self.width)
        for first in range(0, self.class_tiles, tiles):
            stop = min(first + tiles, self.class_tiles)
            part = slice(first * block, stop * block)
            rows = self.w[part] if self.index is None else self.w[self.index[part]]
            if not self.w_is_readable:
                rows = _copy_rows(buffer[: len(rows)], rows)
            yield first, stop, rows

    def target_row(self) -> Tensor:
        """Returns the row of w that holds the target, (N,), or -1."""
        if self.index is None or len(self.index) == 0:
            return self.y
        return torch.where(self.y >= 0, self.index[self.y.clamp_min(0)], -1)

    def inverse_norms(self, rows: Tensor, inverse: Tensor) -> None:
        """Writes 1 / |row| into ``inverse``, which may be longer than ``rows``."""
        norm_kernel[(triton.cdiv(len(inverse), 8),)](
            rows, inverse, R=len(rows), R_PADDED=len(inverse), inverse_limit=self.inverse_limit,
            BLOCK_R=8, BLOCK_D=256, **self.row_settings(),
        )  # fmt: skip

    def flags(self) -> Tensor:
        """Returns (row tiles, class tiles) int8, 1 where a target lies."""
        flags = self.y.new_zeros(self.row_tiles, self.class_tiles, dtype=torch.int8)
        flag_kernel[(self.row_tiles,)](
            self.y, flags, N=len(self.y), class_tiles=self.class_tiles,
            BLOCK_N=self.config.block_n, BLOCK_C=self.config.block_c,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return flags

    def padded(self, per_class: Tensor) -> Tensor:
        """Continues (C,) to the end of the last tile: a mask would make its loads scalar."""
        return _padded(per_class, self.config.block_c)

    def tile_settings(self) -> dict[str, Any]:
        """Returns the settings that both tile kernels are compiled for."""
        config = self.config
        return dict(
            inverse_limit=self.inverse_limit, D_TILES=self.d_tiles, PRECISION=self.precision,
            BLOCK_N=config.block_n, BLOCK_C=config.block_c, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    def row_settings(self) -> dict[str, Any]:
        """Returns the settings that all kernels which walk along rows are compiled for."""
        return dict(
            D_TILES=self.d_tiles, TILE_D=self.config.block_d, num_warps=4, enable_fp_fusion=True
        )


def _padded(per_class: Tensor, block: int) -> Tensor:
    missing = -len(per_class) % block
    if missing == 0:
        return per_class.contiguous()
    return torch.nn.functional.pad(per_class, (0, missing), value=1.0)


def _is_readable(rows: Tensor, width: int, compute_dtype: torch.dtype) -> bool:
    return (
        rows.dtype == compute_dtype
        and rows.shape[1] == width
        and rows.is_contiguous()
        and rows.data_ptr() % 16 == 0
    )


def _copy_rows(to: Tensor, rows: Tensor) -> Tensor:
    to[:, : rows.shape[1]].copy_(rows)
    return to
