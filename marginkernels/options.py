# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the options of :func:`marginkernels.margin_cross_entropy` for type checkers."""

import torch
from torch import Tensor, nn
from typing_extensions import Required, TypedDict

from .distributed.shard import ClassShard
from .sampling import Sampling
from .update import Update


class Options(TypedDict, total=False):
    """Holds the options that both overloads of the function take."""

    margin: Required[nn.Module]
    scale: Required[float | Tensor | nn.Module]
    bias: Tensor | None
    normalize: str
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    focal_gamma: float
    sample_weight: Tensor | None
    class_weight: Tensor | None
    row_margin: Tensor | None
    label_weights: Tensor | None
    other_labels: str
    compute_dtype: torch.dtype | None
    save_tiles: str | bool
    backend: str
    sub_centers: int
    shard: ClassShard | None
    sampling: Sampling | None
    update: Update | None
