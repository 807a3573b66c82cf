# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the operands of both sweeps as the kernels read them, and hands out w chunk by chunk.

Nothing here reads a number from the device, and launches depend on shapes alone: all ops can be
captured in a CUDA graph.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import numerics
from . import configs
from .configs import Config
from .row_kernels import prepare_rows_kernel, project_kernel
from .target_kernels import flag_kernel
from .transforms import Transform

# a row of w is an int32 in the kernels, up to the end of 128 tiles, each of whose classes has
# ``sub_centers`` rows; offsets have 64 bits
MOST_CLASSES = 2**31 - 2**15
# the most that a chunk of classes takes in buffers: for G, for rounded rows of w, and for dw where
# its final place cannot hold it in fp32. So GEMMs run well, and launches are few
CHUNK_BYTES = 512 << 20
# every tile of classes divides it
_CLASSES_PADDING = 256
# numbers of an operand that a program of four warps, and each of more warps, has in registers. On
# an H200 norms alone ran at 4.1 TB/s with 4096 and 3.4 with 2048, other kernels at 4.2 with both
_HELD = 4096
_OF_A_WARP = 512
# D is this times a whole number, or a divisor of this times one: what makes accesses wide
UNIT = 16


def ceil_div(number: int, by: int) -> int:
    """Divides and rounds up. Triton's own takes 2 us, which a launch could do without."""
    return -(-number // by)


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
    rows: Tensor | None  # (C, width) of w as the kernels read them; None: rounded by chunks
    y: Tensor  # (N L,), L targets of each row
    labels: int | None  # L, None: one
    scale: Tensor  # ()
    bias: Tensor | None  # (C,) continued to the end of the last tile
    index: Tensor | None  # (C,) rows of w that are swept; w then has more than C
    transform: Transform
    normalize_w: bool
    sub_centers: int  # rows of w of a class; C counts rows

    @classmethod
    def of(
        cls,
        x: Tensor,  # (N, D)
        w: Tensor,  # (C, D)
        y: Tensor,  # (N,) or (N, L)
        scale: Tensor,  # ()
        bias: Tensor | None,  # (C,)
        index: Tensor | None,  # (C,)
        *,
        normalize_w: bool,
        compute_dtype: torch.dtype,
        transform: str,
        row_parameter: Tensor | None,  # (N,)
        constants: Tensor | None,  # (K,)
        sub_centers: int,
        load: configs.Load,
        config: Config | None,  # in the place of the table's
        x_inv: Tensor | None = None,  # (N,)
        w_rounded: Tensor | None = None,  # (C, D) in the compute type, as forward has kept it
    ) -> "Operands":
        """Checks the operands, chooses tiles, and brings x into the form that the kernels read.

        Writes the inverse norms of its rows into ``x_inv``, where it is given.
        """
        functor = Transform.of(transform, row_parameter, constants, len(x), bias is not None)
        count, most = len(w if index is None else index), MOST_CLASSES - (sub_centers - 1) * 2**15
        if count >= most:
            raise ValueError(f"w: expected fewer than {most} classes, got {count}")
        if sub_centers < 1 or count % sub_centers:
            raise ValueError(f"w: expected a multiple of sub_centers = {sub_centers}, got {count}")
        target = configs.target(x.device)
        kind = configs.kind(compute_dtype, target.name)
        config = config or configs.choose(target.name, kind, load, len(x))
        width = ceil_div(x.shape[1], config.block_d) * config.block_d
        readable = _is_readable(x, width, compute_dtype)
        rows = x if readable else x.new_empty(len(x), width, dtype=compute_dtype)
        w_rows = w if index is None and w_rounded is None else w_rounded
        if w_rows is not None and not _is_readable(w_rows, width, compute_dtype):
            w_rows = None
        operands = cls(
            config=config,
            target=target,
            precision="tf32" if kind == "tf32" else "ieee",
            inverse_limit=1 / numerics.least_norm(compute_dtype),
            width=width,
            x=rows,
            w=w,
            rows=w_rows,
            y=y.contiguous().flatten(),
            labels=None if y.ndim == 1 or y.shape[1] == 1 else y.shape[1],
            scale=scale,
            bias=None if bias is None else _continued(bias, config.block_c * sub_centers),
            index=None if index is None else index.contiguous(),
            transform=functor,
            normalize_w=normalize_w,
            sub_centers=sub_centers,
        )
        operands.prepare(x, None if readable else rows, x_inv)
        return operands

    @functools.cached_property
    def count(self) -> int:
        """Counts the rows of w that are swept, C."""
        return len(self.w if self.index is None else self.index)

    @functools.cached_property
    def classes(self) -> int:
        """Counts the classes that are swept."""
        return self.count // self.sub_centers

    @functools.cached_property
    def row_tiles(self) -> int:
        """Counts the row tiles."""
        return ceil_div(len(self.x), self.config.block_n)

    @functools.cached_property
    def class_tiles(self) -> int:
        """Counts the class tiles."""
        return ceil_div(self.classes, self.config.block_c)

    @functools.cached_property
    def tile_rows(self) -> int:
        """Counts the rows of w in a class tile."""
        return self.config.block_c * self.sub_centers

    @functools.cached_property
    def d_tiles(self) -> int:
        """Counts the steps of the tile program's main loop."""
        return self.width // self.config.block_d

    def statistics(self, *size: int) -> Tensor:
        """Allocates fp32 numbers on the device."""
        return self.x.new_empty(size, dtype=torch.float32)

    @property
    def programs(self) -> int:
        """Counts the programs of a tile kernel that run at the same time."""
        return self.target.multiprocessors * self.config.ctas

    def columns(self) -> int:
        """Returns the programs per row tile of the statistics."""
        return configs.columns(self.programs, self.row_tiles, self.class_tiles)

    def chunk_tiles(self, row_bytes: int) -> int:
        """Returns how many class tiles a chunk has, of which each row of w takes so many bytes.

        A row also takes a rounded one where w has to be rounded. All chunks have about the same
        size.
        """
        if self.rows is None:
            row_bytes += self.width * self.x.itemsize
        most = max(1, CHUNK_BYTES // max(1, row_bytes * self.tile_rows))
        return ceil_div(self.class_tiles, max(1, ceil_div(self.class_tiles, most)))

    def keeping(self, rows: Tensor, w_inv: Tensor | None) -> "Operands":
        """Rounds all of w into ``rows`` (C, width), and returns operands that are read from there.

        Writes the inverse norms of the rows into ``w_inv`` (C,), where it is given.
        """
        self.prepare(self.w, rows, w_inv, self.index)
        return dataclasses.replace(self, rows=rows)

    def chunks(self, tiles: int, w_inv: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (first tile, stop tile, rows of w as the kernels read them), ``tiles`` at a time.

        A w of another type, width or layout is rounded chunk by chunk into one buffer, and so are
        the rows of an index. Writes the inverse norms of the rows into ``w_inv`` (C,) on the way,
        where it is given.
        """
        block = self.tile_rows
        if self.rows is not None:
            self.prepare(self.rows, None, w_inv)
        else:
            buffer = self.x.new_empty(min(tiles * block, self.count), self.width)
        for first in range(0, self.class_tiles, tiles):
            stop = min(first + tiles, self.class_tiles)
            part = slice(first * block, min(stop * block, self.count))
            if self.rows is not None:
                rows = self.rows[part]
            else:
                rows = buffer[: part.stop - part.start]
                inverse = None if w_inv is None else w_inv[part]
                if self.index is None:
                    self.prepare(self.w[part], rows, inverse)
                else:
                    self.prepare(self.w, rows, inverse, self.index[part])
            yield first, stop, rows

    def by_centre(self, rows: Tensor) -> Sequence[Tensor]:
        """Returns the rows (classes K, .) of each of the K centres, (classes, .)."""
        if self.sub_centers == 1:
            return [rows]
        return rows.view(-1, self.sub_centers, *rows.shape[1:]).unbind(1)

    def target_row(self) -> Tensor:
        """Returns the rows of w that hold targets, (N L,), or -1."""
        if self.index is None or len(self.index) == 0:
            return self.y
        return torch.where(self.y >= 0, self.index[self.y.clamp_min(0)], -1)

    def target_table(self) -> tuple[Tensor, Tensor]:
        """Returns a tensor with the rows of w that hold targets, and where each stands, or -1."""
        return (self.w, self.target_row()) if self.rows is None else (self.rows, self.y)

    def lasting_target_table(self) -> tuple[Tensor, Tensor | None]:
        """Returns such a table that a later change of w does not reach; None: each its own row."""
        if self.rows is not None and self.rows is not self.w:
            return self.rows, self.y
        table = self.w.new_empty(len(self.y), self.width)
        self.prepare(self.w, table, None, self.target_row())
        return table, None

    def prepare(
        self,
        given: Tensor,  # (., D) of any type and strides
        rows: Tensor | None,  # (R, width)
        inverse: Tensor | None,  # (R,)
        index: Tensor | None = None,  # (R,) rows that are taken, -1: one of zeros
    ) -> None:
        """Writes rows as the kernels read them, and their inverse norms; either may be None.

        Without ``rows``, those given are as the kernels read them.
        """
        count, d = len(given if index is None else index), given.shape[1]
        if count == 0 or (rows is None and inverse is None):
            return
        stride, stride_d = given.stride()
        unit, settings = math.gcd(d, stride, UNIT), self.held_rows
        prepare_rows_kernel[(ceil_div(count, settings["BLOCK_R"]),)](
            given, index, rows, inverse, R=count, D_UNITS=d // unit, stride_units=stride // unit,
            stride_d=stride_d, inverse_limit=self.inverse_limit, UNIT=unit, **settings,
        )  # fmt: skip

    def project(
        self,
        gradient: Tensor,  # (R, width) fp32
        rows: Tensor,  # (R, width)
        *others: Tensor | None,  # see project_kernel
        labels: int | None = None,
        **flags: bool,
    ) -> None:
        """Turns the gradient along unit rows into that of raw rows, see project_kernel."""
        table, d = others[4], self.w.shape[1]
        if table is None:
            raise ValueError("table: expected a tensor, got None")
        stride, stride_d = table.stride()
        unit, settings = math.gcd(d, stride, UNIT), self.held_rows
        project_kernel[(ceil_div(len(rows), settings["BLOCK_R"]),)](
            gradient, rows, *others,
            R=len(rows), D_UNITS=d // unit, labels=labels, table_units=stride // unit,
            table_stride_d=stride_d, inverse_limit=self.inverse_limit, UNIT=unit,
            **flags, **settings,
        )  # fmt: skip

    def flags(self, slot: Tensor | None = None) -> Tensor:
        """Returns (row tiles, class tiles) int8, not 0 where a target lies, see flag_kernel.

        Sets ``slot`` (C,) int32 to -1, where it is given.
        """
        flags = self.y.new_empty(self.row_tiles, self.class_tiles, dtype=torch.int8)
        block_t = 128 if self.labels is None else 64  # the loop over labels takes registers
        flag_kernel[(self.row_tiles * ceil_div(self.class_tiles, block_t),)](
            self.y, flags, slot, N=len(self.x), C=self.count, labels=self.labels,
            class_tiles=self.class_tiles, SUB_CENTERS=self.sub_centers,
            BLOCK_N=self.config.block_n, BLOCK_C=self.config.block_c, BLOCK_T=block_t,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return flags

    def inverse_norms(self) -> Tensor:
        """Allocates an fp32 number for each row of w, (C,), in memory that goes on after them."""
        padding = -self.classes % _CLASSES_PADDING * self.sub_centers
        return self.statistics(self.count + padding)[: self.count]

    def to_last_tile(self, w_inv: Tensor) -> Tensor:
        """Returns ``w_inv`` with what stands after it, to the end of the last tile of classes.

        That has no effect: it is there to be read, since a mask would make the loads scalar. A
        w_inv in memory that ends before is copied.
        """
        size = self.class_tiles * self.tile_rows
        if (w_inv.storage_offset() + size) * w_inv.itemsize > w_inv.untyped_storage().nbytes():
            w_inv = self.inverse_norms().copy_(w_inv)
        return w_inv.as_strided((size,), (1,))

    def factors(self, w_chunk: Tensor) -> list[Tensor] | list[TensorDescriptor]:
        """Returns x and w as the tile kernels take them."""
        config = self.config
        if not config.descriptors:
            return [self.x, w_chunk]
        factors = self.x, w_chunk.view(-1, self.sub_centers * self.width)
        blocks = config.block_n, config.block_c
        return [
            TensorDescriptor.from_tensor(rows, [block, config.block_d])
            for rows, block in zip(factors, blocks, strict=True)
        ]

    def tile_settings(self) -> dict[str, Any]:
        """Returns the settings that both tile kernels are compiled for."""
        config, transform = self.config, self.transform
        return dict(
            TRANSFORM=transform.apply, ONE_VERSUS_REST=transform.one_versus_rest,
            NORMALIZE_W=self.normalize_w, SUB_CENTERS=self.sub_centers,
            inverse_limit=self.inverse_limit, labels=self.labels, D_TILES=self.d_tiles,
            PRECISION=self.precision, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            BLOCK_D=config.block_d, DESCRIPTORS=config.descriptors, FLATTEN=config.flatten,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    @functools.cached_property
    def held_rows(self) -> dict[str, Any]:
        """Returns the settings of kernels whose programs hold whole rows in registers."""
        return self.rows_of(_HELD)

    def rows_of(self, held: int) -> dict[str, Any]:
        """Returns the same with ``held`` numbers of an operand in a program of four warps."""
        block_d = 1 << (self.width - 1).bit_length()
        return self.row_settings() | dict(
            BLOCK_R=max(1, held // block_d), BLOCK_D=block_d,
            num_warps=max(4, min(16, block_d // _OF_A_WARP)),
        )  # fmt: skip

    def row_settings(self) -> dict[str, Any]:
        """Returns the settings that all kernels which walk along rows are compiled for."""
        return dict(
            D_TILES=self.d_tiles, TILE_D=self.config.block_d, num_warps=4, enable_fp_fusion=True
        )


def _continued(bias: Tensor, block: int) -> Tensor:
    """Continues (C,) to the end of the last tile, where logits must not be NaN."""
    missing = -len(bias) % block
    return bias.contiguous() if missing == 0 else torch.nn.functional.pad(bias, (0, missing))


def _is_readable(rows: Tensor, width: int, compute_dtype: torch.dtype) -> bool:
    return (
        rows.dtype == compute_dtype
        and rows.shape[1] == width
        and rows.is_contiguous()
        and rows.data_ptr() % 16 == 0
    )
