# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds scales that follow the data: AdaCos.

A module given as ``scale=`` is called for the scale, a number or 0-d tensor. One that derives from
:class:`AdaptiveScale` also sees the cosines of the whole batch.
"""

import math

import torch
from torch import Tensor, nn

from .arguments import integer
from .margins.base import Margin
from .margins.statistics import Stateful, masked_mean


class AdaptiveScale(nn.Module):
    """Returns the scale at a call, and moves it by what a sweep finds: the base of such scales.

    While ``observes`` holds, :meth:`observe` sees the un-margined cosines of the whole batch. It is
    called before the sweep that trains, with the results of a sweep of its own. Where ``delayed``
    holds it is called after the sweep that trains, with the results of that sweep.
    """

    delayed: bool = False

    @property
    def observes(self) -> bool:
        """Says whether it wants to observe the present step."""
        return self.training

    def observe(self, lse: Tensor, cosine: Tensor, kept: Tensor) -> None:
        """Moves the scale.

        Args:
            lse: (N,), log sum exp(s c_ij) over the other classes, at the present s.
            cosine: (N,), to the target class, without margin.
            kept: (N,) bool, the rows that take part.
        """
        raise NotImplementedError

    def check(self, num_classes: int) -> None:
        """Raises ValueError where the scale does not fit a head of so many classes."""


def observer_of(scale: float | Tensor | nn.Module) -> AdaptiveScale | None:
    """Returns the scale where it wants to observe the present step, else None.

    Raises:
        TypeError: a module has ``observe`` but does not derive from :class:`AdaptiveScale`, or it
            is a margin.
    """
    if isinstance(scale, AdaptiveScale):
        return scale if scale.observes else None
    if isinstance(scale, Margin):
        raise TypeError(
            "scale: expected a number, a 0-d tensor or a module such as AdaCos, got the margin "
            f"{type(scale).__name__}"
        )
    if isinstance(scale, nn.Module) and hasattr(scale, "observe"):
        raise TypeError(
            f"scale: expected {type(scale).__name__}, which has observe(), to derive from "
            "marginkernels.scales.AdaptiveScale"
        )
    return None


class AdaCos(Stateful, AdaptiveScale):
    """Computes s = sqrt(2) ln(C - 1), or following the batch: AdaCos (Zhang et al., 2019,
    arXiv:1905.00292), a scale for :class:`NSoftmax`.

    Fixed: s = sqrt(2) ln(C - 1). Dynamic: s starts there and is set at each training step to

        s = ln(B) / cos(min(pi / 4, median theta_y)),  B = mean_i sum_{j != y_i} exp(s c_ij)

    B has the previous s, and the step uses the new one. That takes two sweeps forward;
    ``delayed=True`` uses the previous s and needs one. ln(B) comes from the rows' log-sum-exp, so
    that it does not overflow; the median of an even number of rows is the lower angle, as
    torch.median's. Where ln(B) <= 0, which a few classes can bring about, s stays. s is a buffer:
    saved, and frozen in eval mode; the authors' code and most others keep a plain attribute that
    also moves in evaluation.

    Args:
        num_classes: C, at least 3.
        dynamic: whether s moves.
        delayed: whether s moves after the step instead of before.
    """

    s: Tensor

    def __init__(self, num_classes: int, *, dynamic: bool = True, delayed: bool = False):
        super().__init__()
        num_classes = integer("num_classes", num_classes, least=3)
        self.fixed_scale = math.sqrt(2) * math.log(num_classes - 1)
        self.num_classes, self.dynamic, self.delayed = num_classes, bool(dynamic), bool(delayed)
        self.remember(**(dict(s=self.fixed_scale) if dynamic else {}))

    def forward(self) -> float | Tensor:
        return self.recall("s") if self.dynamic else self.fixed_scale

    @property
    def observes(self) -> bool:
        return self.dynamic and self.training

    def check(self, num_classes: int) -> None:
        if self.num_classes != num_classes:
            raise ValueError(
                f"scale: expected AdaCos({num_classes}) for {num_classes} classes, got "
                f"AdaCos({self.num_classes})"
            )

    @torch.no_grad()
    def observe(self, lse: Tensor, cosine: Tensor, kept: Tensor) -> None:
        _, count = masked_mean(cosine, kept)
        log_b = lse.masked_fill(~kept, -math.inf).logsumexp(0) - count.log()
        # the lower median of the angles is the upper one of the cosines
        falling = cosine.masked_fill(~kept, -math.inf).sort(descending=True).values
        middle = ((count.long() - 1) // 2).clamp_min(0)
        median = falling.gather(0, middle.reshape(1))[0] if len(falling) else cosine.new_ones(())
        s = log_b / median.clamp_min(math.cos(math.pi / 4)).clamp_max(1)
        usable = torch.isfinite(s) & (s > 0)
        before = self.recall("s")
        self.s.copy_(torch.where(usable, s.to(before.dtype), before))

    def extra_repr(self) -> str:
        return f"{self.num_classes}, dynamic={self.dynamic}, delayed={self.delayed}"
