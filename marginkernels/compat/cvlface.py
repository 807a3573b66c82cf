# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the classifiers of CVLface: its trainer runs with these imports in place of its own::

    # classifiers/partial_fc/__init__.py
    from marginkernels.compat.cvlface import PartialFC_V2
    # classifiers/fc/__init__.py
    from marginkernels.compat.cvlface import FC
    # losses/__init__.py
    from marginkernels.compat.cvlface import AdaFaceLoss, CombinedMarginLoss

Unchanged are the signatures, which classes a rank has, classes that are added so that every rank
has as many, gradients, and the ``state_dict`` with AdaFace's ``batch_mean`` and ``batch_std``. What
differs is what :mod:`.insightface` lists. Besides, a batch of one row leaves AdaFace's statistics
as they are, where CVLface makes them NaN, and eval mode leaves them, too.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .. import arguments, margins
from ..distributed.shard import in_group
from . import insightface
from .insightface import CombinedMarginLoss, MarginLoss
from .norm_statistics import KeepsStatistics

__all__ = ["FC", "AdaFaceLoss", "CombinedMarginLoss", "MarginLoss", "PartialFC_V2"]


class AdaFaceLoss(MarginLoss):
    """Takes CVLface's AdaFace: no limit of the angle, and the gradient passes straight through.

    ``m`` may be reassigned at any step.

    Args:
        s: scale.
        m, h, t_alpha: as of :class:`marginkernels.AdaFace`.
        interclass_filtering_threshold: above 0, the threshold of a
            :class:`marginkernels.InterClassFilter` around the margin.
    """

    def __init__(
        self,
        s: float,
        m: float,
        h: float,
        t_alpha: float,
        interclass_filtering_threshold: float = 0,
    ):
        threshold = arguments.number(
            "interclass_filtering_threshold", interclass_filtering_threshold, most=1
        )
        inner = margins.AdaFace(m, h=h, t_alpha=t_alpha, clip=False, gradient="straight_through")
        margin: nn.Module = inner
        if threshold > 0:
            margin = margins.InterClassFilter(inner, threshold)
        super().__init__(margin, arguments.number("s", s, above=0))
        self.h, self.t_alpha = inner.h, inner.t_alpha
        self.interclass_filtering_threshold = threshold

    @property
    def m(self) -> float | Tensor:
        """Returns the margin's m."""
        return self._inner.m

    @m.setter
    def m(self, value: float) -> None:
        self._inner.m = value

    @property
    def _inner(self) -> margins.AdaFace:
        margin = self.margin
        inner = margin.margin if isinstance(margin, margins.InterClassFilter) else margin
        assert isinstance(inner, margins.AdaFace)
        return inner

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module looks for modules before it looks for properties
        if name == "m":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class PartialFC_V2(KeepsStatistics, insightface.PartialFC_V2):  # noqa: N801
    """Splits the classes over the ranks as CVLface does, each step on a sample of them.

    Args:
        rank, world_size: those of the default group; 0 and 1 without one.
        margin_loss: a :class:`MarginLoss`, such as :class:`CombinedMarginLoss` or
            :class:`AdaFaceLoss`.
        embedding_size, sample_rate, backend: see :class:`insightface.PartialFC_V2`.
        num_classes: of all ranks together. The head has more, up to the next multiple of
            ``world_size``; the softmax is over these too, as in CVLface.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        margin_loss: MarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        *,
        backend: str = "auto",
    ):
        insightface.require_fused(margin_loss)
        here = (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)
        if (rank, world_size) != here:
            raise ValueError(
                f"rank, world_size: expected those of the default group, {here}, got "
                f"{(rank, world_size)}"
            )
        num_classes = arguments.integer("num_classes", num_classes)
        num_classes = -(-num_classes // world_size) * world_size
        super().__init__(margin_loss, embedding_size, num_classes, sample_rate, backend=backend)


class FC(KeepsStatistics, insightface.PartialFC_V2):
    """Holds all classes on every rank, for CVLface's classifier ``fc`` inside DDP.

    The loss is the mean over this rank's rows. AdaFace's statistics are of these rows alone.

    Args:
        margin_loss: a :class:`MarginLoss`, such as :class:`CombinedMarginLoss` or
            :class:`AdaFaceLoss`.
        embedding_size, num_classes, backend: see :class:`insightface.PartialFC_V2`.
    """

    def __init__(
        self,
        margin_loss: MarginLoss,
        embedding_size: int,
        num_classes: int,
        *,
        backend: str = "auto",
    ):
        insightface.require_fused(margin_loss)
        super().__init__(margin_loss, embedding_size, num_classes, backend=backend)

    def _ranks(self) -> tuple[int, int]:
        return 0, 1

    def _warn_if_alone(self) -> None:
        """Says nothing: each rank is meant to learn from its own rows."""
