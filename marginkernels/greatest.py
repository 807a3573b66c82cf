# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds the greatest cosines of each row, block after block of classes: no (N, C) is held."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .norms import row_norm

# rows of w in a block: 8 MB of fp32 cosines for 256 rows of x
CHUNK = 8192
# columns whose maximum stands for them in a first choice
_GROUP = 64


def greatest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k greatest values (N, M), at most M, in each row, and their columns.

    The k greatest lie in the k groups of columns with the greatest maxima: to sort these is less
    work than to sort all.
    """
    n, width = values.shape
    if width <= 2 * k * _GROUP:
        best, columns = values.topk(min(k, width), dim=1)
        return best, columns
    groups = F.pad(values, [0, -width % _GROUP], value=-math.inf).unflatten(1, (-1, _GROUP))
    chosen = groups.amax(2).topk(k, dim=1).indices
    inside = groups.gather(1, chosen[:, :, None].expand(n, k, _GROUP)).flatten(1)
    best, places = inside.topk(k, dim=1)
    columns = chosen.gather(1, places // _GROUP) * _GROUP + places % _GROUP
    return best, columns


def greatest_cosines(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C K, D)
    index: Tensor | None,  # the rows of w that count; None: all
    targets: Tensor,  # (N,) or (N, L), places of the targets among these rows, -1: none
    k: int,
    sub_centers: int,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Returns the k greatest cosines of each row and classes that are none of its targets, (N, k).

    The greatest comes first. Where there are fewer classes, -inf takes their places.
    """
    targets = (targets if targets.ndim == 2 else targets[:, None]).div(
        sub_centers, rounding_mode="floor"
    )
    count = (w if index is None else index).shape[0]
    best = x.new_full((len(x), k), -math.inf, dtype=ops.statistics_dtype(compute_dtype))
    step = max(1, CHUNK // sub_centers) * sub_centers
    for start in range(0, count, step):
        rows = slice(start, start + step)
        block = _products(x, w[rows] if index is None else w[index[rows]], compute_dtype)
        if sub_centers > 1:
            block = block.unflatten(1, (-1, sub_centers)).amax(2)
        places, width = targets - start // sub_centers, block.shape[1]
        inside = (places >= 0) & (places < width)
        # -inf takes a target's column out; a target elsewhere is given a column to leave as it is
        limit = torch.where(inside, -math.inf, math.inf).to(block)
        block.scatter_reduce_(1, places.clamp(0, width - 1), limit, "amin")
        best, _ = torch.cat([best, greatest(block, k)[0]], dim=1).topk(k, dim=1)
    return best / row_norm(x, compute_dtype)[:, None]


def _products(x: Tensor, w: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Returns |x_i| times the cosines of the rows as rounded, (N, C) in the statistics dtype."""
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda" and compute_dtype.itemsize == 2:
            # as exact as a product in fp32, which adds up the same products
            product = torch.mm(x.to(compute_dtype), w.to(compute_dtype).T, out_dtype=torch.float32)
        else:
            product = ops.rounded(x, compute_dtype) @ ops.rounded(w, compute_dtype).T
    return product.div_(row_norm(w, compute_dtype))
