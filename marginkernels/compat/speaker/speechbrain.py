# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the classifier and the losses of speechbrain's speaker recipes.

In the hyperparameters of a recipe three names change::

    classifier: !new:marginkernels.compat.speaker.Classifier
        input_size: 192
        out_neurons: !ref <out_n_neurons>

    compute_cost: !new:marginkernels.compat.speaker.LogSoftmaxWrapper
        loss_fn: !new:marginkernels.compat.speaker.AdditiveAngularMargin
            margin: 0.2
            scale: 30

The classifier returns a :class:`marginkernels.LazyCosine`, and the loss is a sweep. Each goes with
the other's counterpart in speechbrain too, where the cosines (N, C) then exist.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import arguments, margins
from ...lazy import LazyCosine
from ..weights import FusedHead

__all__ = ["AdditiveAngularMargin", "AngularMargin", "Classifier", "LogSoftmaxWrapper"]


class Classifier(FusedHead):
    """Gives the cosines of embeddings to the speakers: ``lobes.models.ECAPA_TDNN.Classifier``.

    Args:
        input_size: D.
        device: of ``weight`` (C, D).
        lin_blocks: the number of speechbrain's own layers before: each a batch norm and a linear
            layer.
        lin_neurons: their outputs.
        out_neurons: C.
    """

    def __init__(
        self,
        input_size: int,
        device: torch.device | str = "cpu",
        lin_blocks: int = 0,
        lin_neurons: int = 192,
        out_neurons: int = 1211,
    ):
        super().__init__()
        self.blocks = nn.ModuleList()
        input_size = arguments.integer("input_size", input_size)
        for _ in range(arguments.integer("lin_blocks", lin_blocks, least=0)):
            from speechbrain.nnet.linear import Linear
            from speechbrain.nnet.normalization import BatchNorm1d

            linear = Linear(input_size=input_size, n_neurons=lin_neurons)
            self.blocks.extend([BatchNorm1d(input_size=input_size), linear])
            input_size = lin_neurons
        out_neurons = arguments.integer("out_neurons", out_neurons)
        weight = torch.empty(out_neurons, input_size, device=device)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Returns cosines (B, 1, C) of embeddings (B, 1, D), or (B, D)."""
        for layer in self.blocks:
            x = layer(x)
        return LazyCosine(x.squeeze(1), self.weight, update=self._update).unsqueeze(1)


class AngularMargin(nn.Module):
    """Takes cos(theta) - margin for the target: ``nnet.losses.AngularMargin``.

    ``margin`` and ``scale`` may be changed at any step.
    """

    limit = 2.0  # of the margin

    def __init__(self, margin: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.margin = arguments.number("margin", margin, least=0, below=self.limit)
        self.scale = arguments.number("scale", scale, above=0)

    def fused(self) -> margins.ParametricMargin:
        """Makes the margin of this step."""
        return margins.CosFace(self.margin)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Computes scaled logits (N, C) from cosines and one-hot targets, which all exist."""
        cosines = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        m = torch.tensor(self.margin, dtype=cosines.dtype, device=cosines.device)
        with_margin = self.fused().target(cosines, m)
        return self.scale * (targets * with_margin + (1 - targets) * cosines)

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        return f"margin={self.margin:g}, scale={self.scale:g}"


class AdditiveAngularMargin(AngularMargin):
    """Takes cos(theta + margin), beyond pi - margin cos(theta) - margin sin(margin):
    ``nnet.losses.AdditiveAngularMargin``.

    Args:
        margin: in radians.
        scale: the factor of the cosines.
        easy_margin: whether only cos(theta) > 0 has a margin. The cosine itself stands elsewhere.
    """

    limit = math.pi

    def __init__(self, margin: float = 0.0, scale: float = 1.0, easy_margin: bool = False):
        super().__init__(margin, scale)
        arguments.boolean("easy_margin", easy_margin)
        self.easy_margin = easy_margin

    def fused(self) -> margins.ParametricMargin:
        """Makes :class:`marginkernels.ArcFace` with speechbrain's branch."""
        return margins.ArcFace(self.margin, branch="easy" if self.easy_margin else "hard")


class LogSoftmaxWrapper(nn.Module):
    """Computes the mean cross-entropy: ``nnet.losses.LogSoftmaxWrapper``.

    Args:
        loss_fn: an :class:`AngularMargin`, which is fused where the outputs are a
            :class:`marginkernels.LazyCosine`. Every other callable gets cosines (N, C), and one-hot
            targets where it takes them, as in speechbrain.
    """

    def __init__(self, loss_fn: Any):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs: Tensor, targets: Tensor, length: Tensor | None = None) -> Tensor:
        """Computes the loss of cosines (B, 1, C) and targets (B, 1).

        ``length`` has no effect, as in speechbrain.
        """
        outputs, targets = outputs.squeeze(1), targets.squeeze(1).long()
        if isinstance(outputs, LazyCosine) and isinstance(self.loss_fn, AngularMargin):
            return outputs.loss(targets, margin=self.loss_fn.fused(), scale=self.loss_fn.scale)
        one_hot = F.one_hot(targets, outputs.shape[1]).float()
        try:
            logits = self.loss_fn(outputs, one_hot)
        except TypeError:
            logits = self.loss_fn(outputs)
        return F.cross_entropy(logits, targets)
