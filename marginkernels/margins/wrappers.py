# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the losses that take their target from another margin, and change the other classes."""

import torch
from torch import Tensor, nn

from .. import arguments, numerics
from ..transforms import IDENTITY, Transform, constants
from .base import Bounded, Margin, MarginHooks, Rows, adapted

# cosines that differ by less are taken for equal: the rounding of two sweeps may order them anew
TIE = 1e-6


class Wrapper(Margin):
    """Computes t by the margin inside, and leaves the other classes to the subclass.

    Args:
        margin: a margin without a transform of its own.
    """

    needs_target_cosine = False

    def __init__(self, margin: nn.Module):
        super().__init__()
        arguments.module("margin", margin, "CosFace(0.4)")
        if adapted(margin).transforms_negatives:
            raise ValueError(
                f"margin: expected one that leaves the negatives alone, got {type(margin).__name__}"
            )
        self.margin = margin
        self.takes_row_margin = self._inner.takes_row_margin

    @property
    def _inner(self) -> MarginHooks:
        return adapted(self.margin)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        return self.margin(c, rows)

    def regularizer(self, rows: Rows) -> Tensor | None:
        return self._inner.regularizer(rows)

    def draw(self, x: Tensor, rank: int = 0) -> Tensor | None:
        return self._inner.draw(x, rank)

    def check(
        self,
        num_classes: int,
        device: torch.device | None = None,
        row_margin: Tensor | None = None,
    ) -> None:
        self._inner.check(num_classes, device, row_margin)

    def bounded(self, row_margin: Tensor | None) -> Bounded | None:
        return self._inner.bounded(row_margin)


class InterClassFilter(Wrapper):
    """Computes t by the margin inside, others 0 where c_j > threshold: Partial FC's filter against
    mislabelled classes (An et al., 2022, arXiv:2203.15565).

    As in insightface arcface_torch a filtered class keeps a logit of 0, exp(0) = 1 in the softmax
    sum, and gets no gradient; the target is exempt. Usual values: threshold 0.4 with CosFace or
    ArcFace and scale 64.

    Args:
        margin: a margin without a transform of its own.
        threshold: a cosine in [-1, 1].
    """

    def __init__(self, margin: nn.Module, threshold: float = 0.4):
        super().__init__(margin)
        self.threshold = arguments.number("threshold", threshold, least=-1, most=1)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        return Transform("interclass_filter", None, constants(rows.x_norm, self.threshold))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"


class InterTopK(Wrapper):
    """Computes t by the margin inside, others cos(theta_j - penalty) for the top_k greatest c_j:
    the inter-top-k penalty (Zhao et al., 2021, arXiv:2110.05042).

    The wrong classes that are nearest to a row come nearer still. wespeaker and ESPnet have it
    with sub-centres: ``InterTopK(ArcFace(0.2, branch="continuous"))`` and ``sub_centers=3``. Usual
    values: top_k = 5, penalty = 0.06 with m = 0.2 and scale 32, the VoxSRC recipes.

    A sweep of its own finds the top_k greatest cosines of each row, over all ranks, and over the
    classes of the sample where the step takes one. Classes that are less than 1e-6 below the last
    of them tie with it, and all of them get the penalty.

    ``top_k`` and ``penalty`` may be reassigned at any step. With 0 as either there is no penalty
    and no sweep for it, as wespeaker has it in large-margin fine-tuning (``do_lm``).
    :class:`MarginSchedule` lets the penalty grow with m.

    Args:
        margin: a margin without a transform of its own.
        top_k: an integer >= 0, how many classes of each row get the penalty.
        penalty: an angle in radians, in [0, 1].
    """

    def __init__(self, margin: nn.Module, top_k: int = 5, penalty: float = 0.06):
        super().__init__(margin)
        self.top_k, self.penalty = top_k, penalty

    @property
    def top_k(self) -> int:
        """Returns how many classes of each row get the penalty."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self._top_k = arguments.integer("top_k", value, least=0)

    @property
    def penalty(self) -> float:
        """Returns the penalty, an angle."""
        return self._penalty

    @penalty.setter
    def penalty(self, value: float) -> None:
        self._penalty = arguments.number("penalty", value, least=0, most=1)

    @property
    def hardest(self) -> int:  # type: ignore[override]
        """Returns how many of the greatest cosines ``negatives`` reads."""
        return self.top_k + 1 if self.top_k > 0 and self.penalty > 0 else 0

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        if rows.hardest is None:
            return IDENTITY
        last, next_ = rows.hardest[:, -2:].unbind(1)
        # between the two, so that no rounding of the sweep to come moves a class across
        threshold = torch.minimum((last + next_) / 2, last - TIE).clamp_min(-2)
        dtype = torch.promote_types(last.dtype, torch.float32)
        penalty = numerics.filled(self.penalty, dtype, last.device)
        return Transform("hardest", threshold, torch.stack([penalty.cos(), penalty.sin()]))

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, penalty={self.penalty:g}"
