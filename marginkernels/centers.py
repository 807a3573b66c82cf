# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds the centres of classes among the rows of w, where a class has K of them.

Class c has the rows c K .. c K + K - 1. The one that is nearest to a row of x stands for the class,
and of equally near ones the first.
"""

import torch
from torch import Tensor

from . import ops
from .norms import row_norm


def rows_of(classes: Tensor, sub_centers: int) -> Tensor:
    """Returns the rows of w, (n K,), that are the centres of classes (n,), in their order."""
    places = torch.arange(sub_centers, device=classes.device)
    return (classes[:, None] * sub_centers + places).flatten()


@torch.no_grad()
def nearest(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C K, D), with a class at least
    classes: Tensor,  # (N,) or (N, L), -1: none
    sub_centers: int,
    normalize_w: bool,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Returns which centre of its class, 0 to K - 1, is nearest to each row, shaped as classes."""
    found = products(x, w, classes, sub_centers, normalize_w, compute_dtype)
    return found.argmax(-1)  # the first of equals


def products(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C K, D), with a class at least
    classes: Tensor,  # (N,) or (N, L), -1: none
    sub_centers: int,
    normalize_w: bool,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Computes q_j <x_i, w_j> for the centres of each row's class, as the sweep rounds it.

    Returns:
        The products, shaped as classes with one more dimension of K; anything where there is none.
    """
    first = classes.clamp_min(0).flatten() * sub_centers
    rows = ops.rounded(x, compute_dtype)
    if classes.ndim > 1:
        rows = rows.repeat_interleave(classes.shape[1], 0)
    found = []
    for centre in range(sub_centers):  # one by one, so that there are N D numbers at a time
        w_y = w[first + centre]
        product = (rows * ops.rounded(w_y, compute_dtype)).sum(1)
        found.append(product / row_norm(w_y, compute_dtype) if normalize_w else product)
    return torch.stack(found, 1).unflatten(0, classes.shape)
