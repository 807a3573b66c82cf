# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_fwd: decides which kernel runs on which chunk of the classes."""

import torch
from torch import Tensor

from ... import ops
from ...transforms import TRANSFORMS
from . import configs
from .configs import Config
from .constants import LOGIT_MAXIMUM, MAXIMUM, PLANES
from .operands import Operands, ceil_div
from .row_kernels import finish_rows_kernel
from .tile_kernels import statistics_kernel


def head_fwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D)
    y: Tensor,  # (N,) or (N, L) targets
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None = None,  # (C,) rows of w, which then has more
    known_w_inv: Tensor | None = None,  # (C,)
    *,
    normalize_x: bool,
    normalize_w: bool,
    compute_dtype: torch.dtype,
    save_tiles: bool,
    want_sum: bool,
    want_max: bool,
    transform: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    keep_rounded: bool = False,
    sub_centers: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Computes the op of :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    if save_tiles:
        _check_that_tiles_can_be_saved(y, transform, sub_centers)
    x_inv = x.new_empty(len(x), dtype=torch.float32)
    operands = Operands.of(
        x, w, y, scale, bias, index, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
        sub_centers=sub_centers, config=config, x_inv=x_inv if normalize_x else None,
        load=configs.load(
            "statistics", transform, sub_centers, saved=save_tiles,
            extras=want_sum or bias is not None or y.numel() > len(x),
        ),
    )  # fmt: skip
    n, c = len(x), operands.count
    tiles_shape = configs.tiles_shape(n, c) if save_tiles else (0,)
    results = ops.Forward(
        lse=operands.statistics(n),
        target_cosine=operands.statistics(*y.shape),
        w_norm=operands.statistics(*y.shape),
        logit_sum=operands.statistics(n if want_sum else 0),
        logit_max=operands.statistics(n if want_max else 0),
        x_inv=x_inv if normalize_x else x_inv.fill_(1),
        w_inv=operands.inverse_norms(),
        tiles=x.new_empty(tiles_shape, dtype=compute_dtype if save_tiles else torch.float32),
        w_rounded=x.new_empty((c, x.shape[1]) if keep_rounded else 0, dtype=compute_dtype),
    )
    unknown = results.w_inv if known_w_inv is None else None
    if known_w_inv is not None:
        results.w_inv.copy_(known_w_inv)
    if keep_rounded:
        operands, unknown = operands.keeping(results.w_rounded, unknown), None
    separate_max = want_max and (save_tiles or operands.transform.apply is not None)
    partials = _take_statistics(operands, results, unknown, save_tiles, want_sum, separate_max)
    if n:
        _finish_rows(operands, results, partials, want_sum, want_max, separate_max)
    return results


def _check_that_tiles_can_be_saved(y: Tensor, transform: str, sub_centers: int) -> None:
    """Raises ValueError where G is not what the saved exponentials are, but for factors."""
    obstacles = {
        f"sub_centers = {sub_centers}": sub_centers > 1,
        f"y of shape {tuple(y.shape)}": y.ndim > 1 and y.shape[1] > 1,
        f"the transform {transform!r}": TRANSFORMS[transform].one_versus_rest,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise ValueError(f"save_tiles: expected False with {obstacle}, got True")


def _take_statistics(
    operands: Operands,
    results: ops.Forward,
    unknown: Tensor | None,  # (C,) w_inv, where it is to be written
    save_tiles: bool,
    want_sum: bool,
    separate_max: bool,
) -> Tensor:
    """Takes the statistics of all classes, and the inverse norms of their rows, by chunks.

    Returns the partial statistics, (PLANES, columns, N).
    """
    n = len(operands.x)
    flags = operands.flags() if n else None
    columns = operands.columns()
    partials = operands.statistics(PLANES, columns, n)
    w_inv, tiles = operands.to_last_tile(results.w_inv), results.tiles
    for first, stop, w_chunk in operands.chunks(operands.chunk_tiles(0), unknown):
        if n:
            statistics_kernel[(operands.row_tiles * columns,)](
                *operands.factors(w_chunk), operands.y, results.x_inv, w_inv, operands.scale,
                operands.bias, *operands.transform.operands, flags, partials,
                tiles if save_tiles else None,
                N=n, C=operands.classes, first_tile=first, stop_tile=stop,
                class_tiles=operands.class_tiles, columns=columns, carry=int(first > 0),
                tiles_stride=tiles.shape[-1] // operands.config.block_c,
                SAVE_TILES=save_tiles, WANT_SUM=want_sum, SEPARATE_MAX=separate_max,
                **operands.tile_settings(),
            )  # fmt: skip
    return partials


def _finish_rows(
    operands: Operands,
    results: ops.Forward,
    partials: Tensor,  # (PLANES, columns, N)
    want_sum: bool,
    want_max: bool,
    separate_max: bool,
) -> None:
    """Merges the partial statistics of every row, and adds the targets' cosines and norms."""
    n = len(operands.x)
    w, w_row = operands.target_table()
    finish_rows_kernel[(ceil_div(n, 4),)](
        operands.x, w, operands.y, w_row, results.x_inv, results.w_inv, partials,
        results.lse, results.target_cosine, results.w_norm,
        results.logit_sum if want_sum else None, results.logit_max if want_max else None,
        N=n, D=operands.w.shape[1], labels=operands.labels, w_stride_c=w.stride(0),
        w_stride_d=w.stride(1), columns=partials.shape[1], NORMALIZE_W=operands.normalize_w,
        LOG2_UNITS=operands.bias is None and not operands.transform.one_versus_rest,
        ONE_VERSUS_REST=operands.transform.one_versus_rest,
        MAXIMUM_PLANE=(LOGIT_MAXIMUM if separate_max else MAXIMUM).value,
        BLOCK_N=4, BLOCK_P=64, BLOCK_D=256, **operands.row_settings(),
    )  # fmt: skip
