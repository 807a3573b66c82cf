# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines insightface's margin losses (arcface_torch) for :class:`insightface.PartialFC_V2`."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments, margins, validation


class MarginLoss(nn.Module):
    """Joins a margin of :mod:`marginkernels.margins` with a scale, for :class:`PartialFC_V2`.

    Args:
        margin: any margin, also one that insightface does not have.
        s: the scale, a number, a 0-d tensor or a module, as ``scale`` of
            :func:`marginkernels.margin_cross_entropy`.
    """

    s: float | Tensor | nn.Module
    _given_s: Tensor | None = None  # None for a number

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
        """Returns the margin that :class:`PartialFC_V2` fuses with its linear layer."""
        return self.margin

    def extra_repr(self) -> str:
        """Returns the scale as ``print`` shows it, where it is a number."""
        return f"s={self.s:g}" if arguments.is_number(self.s) else ""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Raises RuntimeError: a margin may need more than the cosines of a call."""
        raise RuntimeError(
            f"MarginLoss: {type(self.margin).__name__} may look at more than cosines: "
            "PartialFC_V2 computes it, a call does not"
        )


class CosineMarginLoss(MarginLoss):
    """Serves as the base of insightface's own losses, which can be called with the cosines too.

    Its ``numbers`` have insightface's names. A new value is checked as in the constructor, and
    holds from the next step.

    :class:`marginkernels.MarginSchedule` can move the m of ``fused``. That margin stays when ``s``
    gets a new value, while a new value of another number makes a new margin.
    """

    numbers: tuple[str, ...] = ("s",)
    gradient = "exact"
    s: float

    def __init__(self, **values: float):
        nn.Module.__init__(self)
        self._take(values)

    def _take(self, values: dict[str, float]) -> None:
        """Takes all numbers, or none where they are wrong."""
        values["s"] = arguments.number("s", values["s"], above=0)
        made = self.make(**{name: values[name] for name in self.numbers if name != "s"})
        self.__dict__.update(values)
        self._made = made.train(self.training)

    def make(self, *args: Any, **values: Any) -> nn.Module:
        """Makes the margin with these values of the numbers other than s."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "s":
            self.__dict__["s"] = arguments.number("s", value, above=0)
        elif name in self.numbers:
            self._take({known: getattr(self, known) for known in self.numbers} | {name: value})
        else:
            super().__setattr__(name, value)

    @property
    def fused(self) -> nn.Module:
        """Returns the margin that :meth:`make` made last."""
        return self._made

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns s times the cosines, with the margin in the column of each row's label.

        It is for calls without :class:`PartialFC_V2`. The result is a new tensor, while
        insightface's losses overwrite ``logits``.

        Args:
            logits: cosines (N, C).
            labels: (N,) or (N, 1), -1 for a row without a label.
        """
        if isinstance(labels, margins.Rows):
            raise TypeError(
                f"margin: expected a margin, got insightface's {type(self).__name__}: give it to "
                "PartialFC_V2, or the margin inside, its fused, to MarginSoftmaxHead"
            )
        here = labels.reshape(-1, 1) >= 0
        column = labels.reshape(-1, 1).clamp_min(0)
        c, ones = logits.gather(1, column), torch.ones_like(logits[:, 0])
        t = self.fused(c[:, 0], margins.Rows(column[:, 0], ones, ones, None, here[:, 0]))
        others = logits
        if isinstance(self.fused, margins.InterClassFilter):
            others = logits.masked_fill(logits > self.fused.threshold, 0)
        target = torch.where(here, t[:, None], others.gather(1, column))
        return self.s * others.scatter(1, column, target)


def _m_of(kind: type[margins.ParametricMargin], name: str) -> property:
    """Makes the property ``name``: the m of a margin of this kind, which a schedule may have moved.

    Where the margin made is of another kind, the property is the number that was given.
    """

    def read(loss: CosineMarginLoss) -> Any:
        margin = loss.fused
        if isinstance(margin, margins.InterClassFilter):
            margin = margin.margin
        return margin.m if isinstance(margin, kind) else loss.__dict__[name]

    return property(read)


class CombinedMarginLoss(CosineMarginLoss):
    """Takes insightface's two forms of a combined margin.

    For m3 > 0 it is CosFace with m3, whatever m1 and m2 are. For m1 = 1 and m3 = 0 it is ArcFace
    with m2, cos(theta + m2) without a branch past theta = pi - m2. m2 is in radians.
    :class:`marginkernels.CombinedMargin` in :class:`MarginLoss` combines all three.

    Args:
        s: scale.
        m1, m2, m3: see above.
        interclass_filtering_threshold: above 0, the threshold of a
            :class:`marginkernels.InterClassFilter` around the margin.
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

    def make(
        self, m1: float, m2: float, m3: float, interclass_filtering_threshold: float
    ) -> nn.Module:
        """Makes CosFace or ArcFace, in a filter where there is a threshold."""
        for name, value in (("m1", m1), ("m2", m2)):
            arguments.number(name, value)
        arguments.number("m3", m3, least=0, most=2)
        arguments.number("interclass_filtering_threshold", interclass_filtering_threshold, most=1)
        margin: nn.Module
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
    """Takes cos(theta + margin), margin in radians, without a branch past theta = pi - margin.

    ``gradient`` is that of :class:`CombinedMarginLoss`.
    """

    numbers = ("s", "margin")
    margin = _m_of(margins.ArcFace, "margin")

    def __init__(self, s: float = 64.0, margin: float = 0.5, *, gradient: str = "straight_through"):
        self.__dict__["gradient"] = gradient
        super().__init__(s=s, margin=margin)

    def make(self, margin: float) -> nn.Module:
        """Makes :class:`marginkernels.ArcFace` without a branch."""
        return _arcface("margin", margin, self.gradient)


class CosFace(CosineMarginLoss):
    """Takes cos(theta) - m as the target's cosine."""

    numbers = ("s", "m")
    m = _m_of(margins.CosFace, "m")

    def __init__(self, s: float = 64.0, m: float = 0.40):
        super().__init__(s=s, m=m)

    def make(self, m: float) -> nn.Module:
        """Makes :class:`marginkernels.CosFace`."""
        return margins.CosFace(arguments.number("m", m, least=0, most=2))


def _arcface(name: str, m: float, gradient: str) -> nn.Module:
    m = arguments.number(name, m, least=0, below=math.pi)
    return margins.ArcFace(m, branch="none", gradient=gradient)
