# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the classifier and the losses of 3D-Speaker, whose package is ``speakerlab``.

In the configuration of a recipe two names change::

    classifier:
      obj: marginkernels.compat.speaker.CosineClassifier

    loss:
      obj: marginkernels.compat.speaker.ArcMarginLoss

The classifier returns a :class:`marginkernels.LazyCosine`, and the loss is a sweep. Each goes with
the other's counterpart in 3D-Speaker too, where the cosines (N, C) then exist.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import arguments, margins
from ...lazy import LazyCosine
from ..weights import FusedHead

__all__ = ["AddMarginLoss", "ArcMarginLoss", "CosineClassifier"]


class CosineClassifier(FusedHead):
    """Gives the cosines of embeddings to the speakers: ``models.campplus.classifier``.

    Args:
        input_dim: D.
        num_blocks: the number of layers before: each linear, with a batch norm.
        inter_dim: their outputs.
        out_neurons: C.
    """

    def __init__(
        self, input_dim: int, num_blocks: int = 0, inter_dim: int = 512, out_neurons: int = 1000
    ):
        super().__init__()
        self.blocks = nn.ModuleList()
        input_dim = arguments.integer("input_dim", input_dim)
        for _ in range(arguments.integer("num_blocks", num_blocks, least=0)):
            self.blocks.append(DenseLayer(input_dim, arguments.integer("inter_dim", inter_dim)))
            input_dim = inter_dim
        weight = torch.empty(arguments.integer("out_neurons", out_neurons), input_dim)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))

    def forward(self, x: Tensor) -> LazyCosine:
        """Returns cosines (N, C) of embeddings (N, D)."""
        for layer in self.blocks:
            x = layer(x)
        return LazyCosine(x, self.weight, update=self._update)


class DenseLayer(nn.Module):
    """Is a linear layer without a bias and a batch norm, under the names of 3D-Speaker's."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.nonlinear = nn.Sequential()
        self.nonlinear.add_module("batchnorm", nn.BatchNorm1d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels) to (N, out_channels)."""
        return self.nonlinear(F.linear(x, self.linear.weight.squeeze(2)))


class ArcMarginLoss(nn.Module):
    """Takes cos(theta + margin), beyond pi - margin cos(theta) - 1 - cos(pi - margin):
    ``loss.margin_loss.ArcMarginLoss``.

    Args:
        scale: the factor of the cosines.
        margin: in radians.
        easy_margin: whether only cos(theta) > 0 has a margin. The cosine itself stands elsewhere.
    """

    limit = math.pi  # of the margin

    def __init__(self, scale: float = 32.0, margin: float = 0.2, easy_margin: bool = False):
        super().__init__()
        self.scale = arguments.number("scale", scale, above=0)
        arguments.boolean("easy_margin", easy_margin)
        self.easy_margin = easy_margin
        self.update(margin)

    def update(self, margin: float = 0.2) -> None:
        """Sets the margin, as the margin scheduler does at every step."""
        self.margin = arguments.number("margin", margin, least=0, below=self.limit)

    def fused(self) -> margins.ParametricMargin:
        """Makes :class:`marginkernels.ArcFace` with 3D-Speaker's branch."""
        return margins.ArcFace(self.margin, branch="easy" if self.easy_margin else "continuous")

    def forward(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Computes the mean loss of cosines (N, C) and labels (N,)."""
        if isinstance(cosine, LazyCosine):
            return cosine.loss(label, margin=self.fused(), scale=self.scale)
        m = torch.tensor(self.margin, dtype=cosine.dtype, device=cosine.device)
        target = self.fused().target(cosine.gather(1, label[:, None]), m)
        logits = cosine.scatter(1, label[:, None], target)
        return F.cross_entropy(self.scale * logits, label)

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        return f"scale={self.scale:g}, margin={self.margin:g}, easy_margin={self.easy_margin}"


class AddMarginLoss(ArcMarginLoss):
    """Takes cos(theta) - margin: ``loss.margin_loss.AddMarginLoss``.

    Args:
        scale: the factor of the cosines.
        margin: of the cosine.
        easy_margin: has no effect, as in 3D-Speaker.
    """

    limit = 2.0

    def fused(self) -> margins.ParametricMargin:
        """Makes :class:`marginkernels.CosFace`."""
        return margins.CosFace(self.margin)
