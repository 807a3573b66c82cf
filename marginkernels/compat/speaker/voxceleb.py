# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the losses of voxceleb_trainer that classify speakers.

A file in its folder ``loss``, say ``loss/fused_aamsoftmax.py``, makes one of them the choice
``--trainfunc fused_aamsoftmax``::

    from marginkernels.compat.speaker.voxceleb import AAMSoftmax as LossFunction
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import arguments, margins
from ...functional import margin_cross_entropy
from ..weights import FusedHead
from .hits import hits, with_margin

__all__ = ["AAMSoftmax", "AMSoftmax", "Softmax"]


class AngularLoss(FusedHead):
    """Holds what the losses with a margin share.

    ``m`` and ``s`` are margin and scale. A new value holds from the next step.
    """

    test_normalize = True  # the trainer asks: whether it compares unit embeddings
    limit = math.pi  # of the margin

    def __init__(self, nOut: int, nClasses: int, margin: float, scale: float):  # noqa: N803
        super().__init__()
        self.in_feats = arguments.integer("nOut", nOut)
        self.num_classes = arguments.integer("nClasses", nClasses)
        self.s = arguments.number("scale", scale, above=0)
        self.m = arguments.number("margin", margin, least=0, below=self.limit)

    def fused(self) -> nn.Module:
        """Makes the margin of this step."""
        raise NotImplementedError

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the mean loss of embeddings (N, D), and the accuracy in percent, (1,).

        As in voxceleb_trainer a row is right if its target's logit is the greatest with the margin.
        """
        label, margin = label.reshape(-1), self.fused()
        loss, stats = self.fused_loss(x, label, margin=margin, scale=self.s, return_stats=True)
        return loss, _percent(hits(with_margin(margin, stats, label), stats, self.s))

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        return f"nOut={self.in_feats}, nClasses={self.num_classes}, margin={self.m}, scale={self.s}"


class AAMSoftmax(AngularLoss):
    """Takes cos(theta + margin), beyond pi - margin cos(theta) - margin sin(margin):
    ``loss/aamsoftmax.py``.

    Args:
        nOut, nClasses: D and C.
        margin: in radians.
        scale: the factor of the cosines.
        easy_margin: whether only cos(theta) > 0 has a margin. The cosine itself stands elsewhere.
        kwargs: the trainer's other settings, which are ignored.
    """

    def __init__(
        self,
        nOut: int,  # noqa: N803
        nClasses: int,  # noqa: N803
        margin: float = 0.3,
        scale: float = 15,
        easy_margin: bool = False,
        **kwargs: Any,
    ):
        super().__init__(nOut, nClasses, margin, scale)
        self.easy_margin = easy_margin
        weight = torch.empty(self.num_classes, self.in_feats)
        self.weight = nn.Parameter(nn.init.xavier_normal_(weight))

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.ArcFace` with the trainer's branch."""
        return margins.ArcFace(self.m, branch="easy" if self.easy_margin else "hard")


class AMSoftmax(AngularLoss):
    """Takes cos(theta) - margin: ``loss/amsoftmax.py``.

    The class weights are ``W``, (nOut, nClasses).

    Args:
        nOut, nClasses: D and C.
        margin: of the cosine.
        scale: the factor of the cosines.
        kwargs: the trainer's other settings, which are ignored.
    """

    weight_name, transposed = "W", True
    limit = 2.0

    def __init__(
        self,
        nOut: int,  # noqa: N803
        nClasses: int,  # noqa: N803
        margin: float = 0.3,
        scale: float = 15,
        **kwargs: Any,
    ):
        super().__init__(nOut, nClasses, margin, scale)
        weight = torch.randn(self.in_feats, self.num_classes)  # so many numbers the original draws
        self.W = nn.Parameter(nn.init.xavier_normal_(weight))

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.CosFace`."""
        return margins.CosFace(self.m)


class Softmax(nn.Module):
    """Takes the plain softmax of a linear layer with a bias: ``loss/softmax.py``.

    Args:
        nOut, nClasses: D and C.
        kwargs: the trainer's other settings, which are ignored.
    """

    test_normalize = True

    def __init__(self, nOut: int, nClasses: int, **kwargs: Any):  # noqa: N803
        super().__init__()
        self.fc = nn.Linear(nOut, nClasses)

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the mean loss of embeddings (N, D), and the accuracy in percent, (1,)."""
        loss, stats = margin_cross_entropy(
            x, self.fc.weight, label.reshape(-1), margin=margins.NSoftmax(), scale=1.0,
            normalize="none", bias=self.fc.bias, return_stats=True,
        )  # fmt: skip
        return loss, _percent(stats.correct)


def _percent(right: Tensor) -> Tensor:
    return 100 * right.float().mean(0, keepdim=True)
