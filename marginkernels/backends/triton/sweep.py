# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""What both sweeps share: the operands as the tiles read them, chunk by chunk, and their norms."""

import dataclasses
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from . import configs
from .configs import Config, Load
from .row_kernels import flag_kernel, norm_kernel

# a class is an int32 in the kernels, up to the end of the last tile; offsets have 64 bits
MOST_CLASSES = 2**31 - 1024
# a chunk of w rounded to the compute type
W_CHUNK_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One pass over the classes: the tiles, and the operands as the tile program reads them.

    Rows are ``width`` numbers wide there, D up to a multiple of the tile's, zeros from D on. So no
    load in the main loop has a mask, and every row starts at a multiple of 16 bytes for any D.
    """

    config: Config
    target: configs.Target
    precision: str  # of tl.dot
    inverse_limit: float  # 1 / norm of a zero row
    w: Tensor  # (C, D) as it came
    x: Tensor  # (N, width) in the compute type
    width: int
    w_is_readable: bool  # as it came

    @classmethod
    def of(
        cls,
        x: Tensor,
        w: Tensor,
        compute_dtype: torch.dtype,
        norm_min: float,
        load: Load,
        config: Config | None,
    ) -> "Sweep":
        if len(w) >= MOST_CLASSES:
            raise ValueError(f"w: expected fewer than {MOST_CLASSES} classes, got {len(w)}")
        target = configs.target(x.device)
        kind = configs.kind(compute_dtype, target.name)
        config = config or configs.choose(target.name, kind, load, len(x))
        width = triton.cdiv(x.shape[1], config.block_d) * config.block_d
        if not _is_readable(x, width, compute_dtype):
            x = _copy_padded(x.new_zeros(len(x), width, dtype=compute_dtype), x)
        return cls(
            config,
            target,
            "tf32" if kind == "tf32" else "ieee",
            1 / norm_min,
            w,
            x,
            width,
            _is_readable(w, width, compute_dtype),
        )

    @property
    def row_tiles(self) -> int:
        return triton.cdiv(len(self.x), self.config.block_n)

    @property
    def class_tiles(self) -> int:
        return triton.cdiv(len(self.w), self.config.block_c)

    @property
    def d_tiles(self) -> int:
        return self.width // self.config.block_d

    def chunk_tiles(self, classes: int) -> int:
        """Class tiles in a chunk of at most ``classes``; less where w has to be rounded first."""
        if not self.w_is_readable:
            classes = min(classes, W_CHUNK_BYTES // (self.width * self.x.itemsize))
        return min(max(1, classes // self.config.block_c), self.class_tiles)

    def chunks(self, tiles: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first tile, stop tile, these rows of w as the tiles read them), ``tiles`` at a time.

        A w of another type, width or layout is rounded chunk by chunk into one buffer.
        """
        block = self.config.block_c
        if not self.w_is_readable:
            buffer = self.x.new_zeros(min(tiles * block, len(self.w)), self.width)
        for first in range(0, self.class_tiles, tiles):
            stop = min(first + tiles, self.class_tiles)
            rows = self.w[first * block : stop * block]
            if not self.w_is_readable:
                rows = _copy_padded(buffer[: len(rows)], rows)
            yield first, stop, rows

    def inverse_norms(self, rows: Tensor, out: Tensor) -> Tensor:
        """1 / |row| into ``out``, which may be longer than ``rows``."""
        norm_kernel[(triton.cdiv(len(out), 8),)](
            rows, out, R=len(rows), R_PADDED=len(out), inverse_limit=self.inverse_limit,
            BLOCK_R=8, BLOCK_D=256, **self.row_settings(),
        )  # fmt: skip
        return out

    def flags(self, y: Tensor) -> Tensor:
        """(row tiles, class tiles) int8, 1 where a target lies."""
        flags = y.new_zeros(self.row_tiles, self.class_tiles, dtype=torch.int8)
        flag_kernel[(self.row_tiles,)](
            y, flags, N=len(y), flags_stride=self.class_tiles,
            BLOCK_N=self.config.block_n, BLOCK_C=self.config.block_c,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return flags

    def padded(self, of_classes: Tensor | None) -> Tensor | None:
        """(C,) continued to the end of the last tile: a mask would make its loads scalar."""
        if of_classes is None:
            return None
        missing = self.class_tiles * self.config.block_c - len(of_classes)
        if missing == 0:
            return of_classes.contiguous()
        return torch.nn.functional.pad(of_classes, (0, missing), value=1.0)

    def tile_settings(self) -> dict:
        """What both tile kernels are compiled for."""
        config = self.config
        return dict(
            inverse_limit=self.inverse_limit, D_TILES=self.d_tiles, PRECISION=self.precision,
            BLOCK_N=config.block_n, BLOCK_C=config.block_c, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    def row_settings(self) -> dict:
        """What all kernels that walk along rows are compiled for."""
        return dict(
            D_TILES=self.d_tiles, TILE_D=self.config.block_d, num_warps=4, enable_fp_fusion=True
        )


def _is_readable(rows: Tensor, width: int, compute_dtype: torch.dtype) -> bool:
    return (
        rows.dtype == compute_dtype
        and rows.shape[1] == width
        and rows.is_contiguous()
        and rows.data_ptr() % 16 == 0
    )


def _copy_padded(to: Tensor, rows: Tensor) -> Tensor:
    to[:, : rows.shape[1]].copy_(rows)
    return to
