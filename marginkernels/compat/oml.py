# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the ArcFace losses of open-metric-learning (OML) with their import changed::

    from marginkernels.compat.oml import ArcFaceLoss  # before: from oml.losses import ArcFaceLoss

Unchanged are the signatures, ``weight`` (C, D) and how it starts, the loss and its gradients, label
smoothing, within categories too, and ``last_logs``. These things differ:

- Past |cos| = 1, where rounding leads, theirs is NaN. Here the loss is exact and its slope bounded.
- A label below 0, or a class without a category, is an error that names it.
- The categories of ``label2category`` move with the module, as a buffer that is not saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import arguments
from ..margins import ArcFace
from .weights import FusedHead

__all__ = ["ArcFaceLoss", "ArcFaceLossWithMLP"]


class ArcFaceLoss(FusedHead):
    """Takes cos(theta + m), and cos(theta) - m sin(m) past theta = pi - m, as the target's cosine.

    With ``label2category`` and smoothing a step also takes the sums of the normalised weights of
    each category in plain PyTorch, which costs a copy of the weights.

    Args:
        in_features, num_classes: D and C.
        m: the margin in radians, in [0, pi).
        s: the scale, ``rescale`` of the module.
        smoothing_epsilon: the share of the targets, in [0, 1), that is spread over all classes, or
            over those of the label's category; None is 0.
        label2category: the category of each class, or None.
        reduction: "mean", "sum" or "none".
    """

    criterion_name = "arcface"  # the name under which OML logs
    label2category: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        m: float = 0.5,
        s: float = 64,
        smoothing_epsilon: float | None = 0,
        label2category: dict[Any, Any] | None = None,
        reduction: str = "mean",
    ):
        super().__init__()
        self.in_features = arguments.integer("in_features", in_features)
        self.num_classes = arguments.integer("num_classes", num_classes)
        self.margin = ArcFace(m)
        self.rescale = arguments.number("s", s, above=0)
        smoothing = smoothing_epsilon or 0
        self.smoothing_epsilon = arguments.number("smoothing_epsilon", smoothing, least=0, below=1)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction
        category = None if label2category is None else _categories(num_classes, label2category)
        self.register_buffer("label2category", category, persistent=False)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.last_logs: dict[str, Any] = {}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss of embeddings (N, D) with labels (N,), and notes the accuracy."""
        category = self.label2category if self.smoothing_epsilon > 0 else None
        loss, stats = self.fused_loss(
            x, y, margin=self.margin, scale=self.rescale,
            label_smoothing=self.smoothing_epsilon if category is None else 0.0,
            reduction=self.reduction if category is None else "none",
            return_stats=True,
        )  # fmt: skip
        self.last_logs["accuracy"] = stats.correct.float().mean()
        if category is None:
            return loss
        return self._reduced(loss + self.smoothing_epsilon * self._smoothing(x, y, category))

    def _smoothing(self, x: Tensor, y: Tensor, category: Tensor) -> Tensor:
        """Computes how far the target's logit is above the mean logit of its category, (N,)."""
        x, weight = (
            F.normalize(t.to(torch.promote_types(t.dtype, torch.float32))) for t in (x, self.weight)
        )
        classes = torch.bincount(category)
        total = weight.new_zeros(len(classes), self.in_features).index_add(0, category, weight)
        own = category[y]
        cosine = (x * weight[y]).sum(1)
        target = self.margin.target(cosine, cosine.new_tensor(self.margin.m))
        mean = ((x * total[own]).sum(1) + target - cosine) / classes[own]
        return self.rescale * (target - mean)

    def _reduced(self, losses: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, s={self.rescale:g}, "
            f"smoothing_epsilon={self.smoothing_epsilon:g}, reduction={self.reduction!r}"
        )


class ArcFaceLossWithMLP(nn.Module):
    """Puts torchvision's ``MLP`` with these sizes of layers before :class:`ArcFaceLoss`.

    The other arguments are those of :class:`ArcFaceLoss`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        mlp_features: list[int],
        m: float = 0.5,
        s: float = 64,
        smoothing_epsilon: float | None = 0,
        label2category: dict[Any, Any] | None = None,
        reduction: str = "mean",
    ):
        from torchvision.ops import MLP  # which OML depends on, and this library does not

        super().__init__()
        self.mlp = MLP(in_features, mlp_features)
        self.arcface = ArcFaceLoss(
            mlp_features[-1], num_classes, m, s, smoothing_epsilon, label2category, reduction
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss of what the MLP makes of x (N, D), with labels (N,)."""
        return self.arcface(self.mlp(x), y)

    @property
    def last_logs(self) -> dict[str, Any]:
        """Returns what :class:`ArcFaceLoss` has noted of the last batch."""
        return self.arcface.last_logs


def _categories(num_classes: int, label2category: dict[Any, Any]) -> Tensor:
    """Returns the number of each class's category, (C,)."""
    missing = [c for c in range(num_classes) if c not in label2category]
    if missing:
        raise ValueError(
            f"label2category: expected a category of each of the {num_classes} classes, got none "
            f"of {missing[0]}"
        )
    number = {name: i for i, name in enumerate(sorted(set(label2category.values())))}
    return torch.tensor([number[label2category[c]] for c in range(num_classes)])
