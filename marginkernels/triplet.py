# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the triplet loss of a batch in blocks of rows: no (N, N) matrix outlives its block."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arguments import boolean, integer, number
from .numerics import LEAST_NORM


class TripletLoss(nn.Module):
    """Computes FaceNet's triplet loss (Schroff et al., 2015, arXiv:1503.03832).

    The loss is mean [d(a, p) - d(a, n) + margin]_+ with d = |.|^2 of unit vectors. A triplet is an
    anchor a, another row p of its class and a row n of another class. ``mining`` says which
    triplets count:

    - "batch_hard": for each anchor the farthest p and the nearest n (Hermans et al., 2017,
      arXiv:1703.07737, who do not square the distance);
    - "semi_hard": for each anchor and each p the nearest n that is farther than p. Where there is
      none, it takes the farthest n, as TensorFlow Addons does; FaceNet's text leaves it open.

    The mean is over these triplets, triplets without loss included, and 0 if there is none.
    Distances are computed a block of rows at a time in fp32, and again in backward. Other projects
    differ from FaceNet in the options: Hermans et al. and fast-reid have ``squared=False,
    normalize=False``, also with the soft margin, and pytorch-metric-learning has ``squared=False,
    mean_over="nonzero"``.

    Args:
        margin: FaceNet has 0.2, insightface 0.3. "soft" takes log(1 + exp(d(a, p) - d(a, n))) in
            the place of [...]_+, as Hermans et al. do.
        mining: "batch_hard" or "semi_hard".
        squared: False takes the distance itself, d = |.|.
        normalize: False takes the embeddings as they are.
        mean_over: "all" of these triplets, or those whose loss is "nonzero".
        ignore_index: label of rows that take no part.
        block_rows: anchors in a block; memory is a few times block_rows x N numbers.
    """

    def __init__(
        self,
        margin: float | Literal["soft"] = 0.2,
        *,
        mining: str = "batch_hard",
        squared: bool = True,
        normalize: bool = True,
        mean_over: str = "all",
        ignore_index: int = -100,
        block_rows: int = 256,
    ):
        super().__init__()
        if mining not in ("batch_hard", "semi_hard"):
            raise ValueError(f"mining: expected 'batch_hard' or 'semi_hard', got {mining!r}")
        if mean_over not in ("all", "nonzero"):
            raise ValueError(f"mean_over: expected 'all' or 'nonzero', got {mean_over!r}")
        boolean("squared", squared)
        boolean("normalize", normalize)
        self.margin = margin if margin == "soft" else number("margin", margin, least=0)
        self.mining, self.mean_over = mining, mean_over
        self.squared, self.normalize = squared, normalize
        self.block_rows = integer("block_rows", block_rows)
        self.ignore_index = integer("ignore_index", ignore_index, least=-(2**63))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss () of embeddings (N, D) with int64 labels (N,)."""
        if embeddings.ndim != 2 or not embeddings.is_floating_point():
            came = f"{embeddings.dtype} {tuple(embeddings.shape)}"
            raise ValueError(f"embeddings: expected a floating tensor (N, D), got {came}")
        if labels.dtype != torch.int64 or labels.shape != embeddings.shape[:1]:
            came = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"labels: expected int64 ({len(embeddings)},), got {came}")
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            points = embeddings.to(wide)
            if self.normalize:
                points = _unit_rows(points)
            total, count = points.sum() * 0, points.new_zeros(())
            for start in range(0, len(points), self.block_rows):
                rows = slice(start, start + self.block_rows)
                # the checkpoint keeps its arguments alone, and computes the block again in backward
                block_total, block_count = checkpoint(
                    self._block, points, labels, rows, use_reentrant=False
                )
                total, count = total + block_total, count + block_count
        return total / count.clamp_min(1)

    def _block(self, points: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the sum of the anchors' losses in ``rows``, and the number of their triplets."""
        distance = self._distance(points[rows], points)  # (B, N)
        kept = labels != self.ignore_index
        same = labels[rows, None] == labels
        pairs = kept[rows, None] & kept
        index = torch.arange(len(labels), device=labels.device)
        positive = pairs & same & (index[rows, None] != index)
        negative = pairs & ~same
        if self.mining == "batch_hard":
            valid = positive.any(1) & negative.any(1)
            farthest = distance.masked_fill(~positive, -math.inf).amax(1)
            nearest = distance.masked_fill(~negative, math.inf).amin(1)
            difference = torch.where(valid, farthest, 0) - torch.where(valid, nearest, 0)
        else:
            valid = positive & negative.any(1, keepdim=True)
            chosen = distance.gather(1, _semi_hard(distance.detach(), negative))
            difference = distance - chosen
        if self.margin == "soft":
            loss = torch.where(valid, F.softplus(difference), 0)
        else:
            loss = torch.where(valid, F.relu(difference + self.margin), 0)
        counted = loss > 0 if self.mean_over == "nonzero" else valid
        return loss.sum(), counted.sum().to(loss.dtype)

    def _distance(self, anchors: Tensor, points: Tensor) -> Tensor:
        """Returns the distances (B, N) that the loss compares."""
        if not self.squared:  # with a gradient of 0 between equal points
            return torch.cdist(anchors, points)
        if self.normalize:
            return 2 - 2 * (anchors @ points.T)
        squares = points.square().sum(1)
        return anchors.square().sum(1, keepdim=True) + squares - 2 * (anchors @ points.T)

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        return (
            f"margin={self.margin!r}, mining={self.mining!r}, squared={self.squared}, "
            f"normalize={self.normalize}, mean_over={self.mean_over!r}"
        )


def _unit_rows(x: Tensor) -> Tensor:
    """Scales rows to norm 1, with a gradient of 0 at zero rows."""
    is_zero = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) < LEAST_NORM
    return F.normalize(torch.where(is_zero, 0, x))


def _semi_hard(distance: Tensor, negative: Tensor) -> Tensor:
    """Returns for each anchor and column p the column of its semi-hard negative, (B, N).

    It is the nearest negative farther than p, or else the farthest negative.
    """
    ascending, columns = distance.masked_fill(~negative, math.inf).sort(1)
    place = torch.searchsorted(ascending, distance, right=True)
    last = (negative.sum(1, keepdim=True) - 1).clamp_min(0)
    return columns.gather(1, place.minimum(last))
