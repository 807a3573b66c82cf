# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The margin losses of insightface's arcface_torch, for :class:`insightface.PartialFC_V2`."""

import math
import warnings

import torch
from torch import Tensor, nn

from .. import arguments, margins, validation


class MarginLoss(nn.Module):
    """A margin of :mod:`marginkernels.margins` with a scale: what :class:`PartialFC_V2` fuses.

    Args:
        margin: any margin, also one that insightface does not have.
        s: scale: a number, a 0-d tensor or a module, as ``scale`` of
            :func:`marginkernels.margin_cross_entropy`.
    """

    _given_s = None  # of a number

    def __init__(self, margin: nn.Module, s: float | Tensor | nn.Module):
        super().__init__()
        arguments.module("margin", margin, "ArcFace(0.5)")
        if not isinstance(s, nn.Module):
            validation.check_scale(s, "s")
        self.margin, self.s = margin, s
        self._given_s = arguments.kept(s)

    def reset_parameters(self) -> None:
        """Restores ``s`` where it is the tensor that was given."""
        arguments.restore("s", self.s, self._given_s)

    @property
    def fused(self) -> nn.Module:
        """The margin."""
        return self.margin

    def extra_repr(self) -> str:
        return f"s={self.s:g}" if arguments.is_number(self.s) else ""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError(
            f"MarginLoss: {type(self.margin).__name__} may look at more than cosines: "
            "PartialFC_V2 computes it, a call does not"
        )


class CosineMarginLoss(MarginLoss):
    """One that insightface has: it can be called with the cosines too, and its ``numbers`` have
    insightface's names. A new value, checked as that of the constructor, holds from the next step.

    :class:`marginkernels.MarginSchedule` can move the m of ``fused``, which stays when ``s`` gets a
    new value; one of the other numbers makes a new margin.
    """

    numbers: tuple[str, ...] = ("s",)
    gradient = "exact"

    def __init__(self, **values: float):
        nn.Module.__init__(self)
        self._take(values)

    def _take(self, values: dict[str, float]) -> None:
        """Takes all numbers, or none where they are wrong."""
        values["s"] = arguments.number("s", values["s"], above=0)
        made = self.make(**{name: values[name] for name in self.numbers if name != "s"})
        self.__dict__.update(values)
        self._made = made.train(self.training)

    def make(self, **values: float) -> nn.Module:
        """The margin with these numbers."""
        raise NotImplementedError

    def __setattr__(self, name: str, value) -> None:
        if name == "s":
            self.__dict__["s"] = arguments.number("s", value, above=0)
        elif name in self.numbers:
            self._take({known: getattr(self, known) for known in self.numbers} | {name: value})
        else:
            super().__setattr__(name, value)

    @property
    def fused(self) -> nn.Module:
        return self._made

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """s times the cosines ``logits`` (N, C) with the margin in the column of each row's label,
        (N,) or (N, 1), -1 where there is none. For calls without :class:`PartialFC_V2`; a new
        tensor, where insightface's overwrites ``logits``.
        """
        here = labels.reshape(-1, 1) >= 0
        column = labels.reshape(-1, 1).clamp_min(0)
        c, ones = logits.gather(1, column), torch.ones_like(logits[:, 0])
        t = self.fused(c[:, 0], margins.Rows(column[:, 0], ones, ones, None, here[:, 0]))
        threshold = getattr(self.fused, "threshold", None)
        others = logits if threshold is None else logits.masked_fill(logits > threshold, 0)
        target = torch.where(here, t[:, None], others.gather(1, column))
        return self.s * others.scatter(1, column, target)


def _m_of(kind: type[margins.Margin], name: str) -> property:
    """The number ``name``: m of the margin made, which may have moved, where it is of this kind."""

    def read(loss: CosineMarginLoss) -> float:
        margin = getattr(loss.fused, "margin", loss.fused)  # inside of a filter
        return margin.m if isinstance(margin, kind) else loss.__dict__[name]

    return property(read)


class CombinedMarginLoss(CosineMarginLoss):
    """insightface's, which has two forms: for m3 > 0 CosFace with m3, whatever m1 and m2 are, and
    for m1 = 1, m3 = 0 ArcFace with m2, without a branch past theta = pi - m2.

    :class:`marginkernels.CombinedMargin` in :class:`MarginLoss` combines all three.

    Args:
        s: scale.
        m1, m2, m3: see above.
        interclass_filtering_threshold: above 0, :class:`marginkernels.InterClassFilter` with it.
        gradient: of ArcFace, "straight_through" as in insightface since December 2022, or "exact".
    """

    numbers = ("s", "m1", "m2", "m3", "interclass_filtering_threshold")
    m2, m3 = _m_of(margins.ArcFace, "m2"), _m_of(margins.CosFace, "m3")

    def __init__(
        self,
        s: float,
        m1: float,
        m2: float,
        m3: float,
        interclass_filtering_threshold: float = 0,
        *,
        gradient: str = "straight_through",
    ):
        self.__dict__["gradient"] = gradient  # before there is a module
        values = zip(self.numbers, (s, m1, m2, m3, interclass_filtering_threshold), strict=True)
        super().__init__(**dict(values))

    def make(self, m1, m2, m3, interclass_filtering_threshold) -> nn.Module:
        for name, value in (("m1", m1), ("m2", m2)):
            arguments.number(name, value)
        arguments.number("m3", m3, least=0, most=2)
        arguments.number("interclass_filtering_threshold", interclass_filtering_threshold, most=1)
        if m3 > 0:
            margin = margins.CosFace(m3)
            if (m1, m2) != (1, 0):
                warnings.warn(
                    f"m1={m1} and m2={m2} have no effect with m3={m3} > 0, as in insightface; "
                    "MarginLoss(marginkernels.CombinedMargin(m1, m2, m3), s) combines them",
                    stacklevel=4,
                )
        elif m1 == 1:
            margin = _arcface("m2", m2, self.gradient)
        else:
            raise ValueError(f"m1, m2, m3: expected m1 = 1 and m3 = 0, or m3 > 0, got {m1, m2, m3}")
        if interclass_filtering_threshold > 0:
            margin = margins.InterClassFilter(margin, interclass_filtering_threshold)
        return margin


class ArcFace(CosineMarginLoss):
    """cos(theta + margin), without a branch past theta = pi - margin; ``gradient`` as for
    :class:`CombinedMarginLoss`.
    """

    numbers = ("s", "margin")
    margin = _m_of(margins.ArcFace, "margin")

    def __init__(self, s: float = 64.0, margin: float = 0.5, *, gradient: str = "straight_through"):
        self.__dict__["gradient"] = gradient
        super().__init__(s=s, margin=margin)

    def make(self, margin) -> nn.Module:
        return _arcface("margin", margin, self.gradient)


class CosFace(CosineMarginLoss):
    """cos(theta) - m."""

    numbers = ("s", "m")
    m = _m_of(margins.CosFace, "m")

    def __init__(self, s: float = 64.0, m: float = 0.40):
        super().__init__(s=s, m=m)

    def make(self, m) -> nn.Module:
        return margins.CosFace(arguments.number("m", m, least=0, most=2))


def _arcface(name: str, m: float, gradient: str) -> nn.Module:
    m = arguments.number(name, m, least=0, below=math.pi)
    return margins.ArcFace(m, branch="none", gradient=gradient)
