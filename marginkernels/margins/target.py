# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the margins that see nothing but the target's cosine."""

import math

import torch
from torch import Tensor

from ..arguments import number
from ..rotation import Rotation
from .angles import safe_acos, safe_sin
from .base import Margin, Rows
from .parametric import Interval, ParametricMargin

BRANCHES = ("hard", "easy", "none", "keep", "continuous", "monotone", "clip")


def arc(c: Tensor, m: Tensor, branch: str) -> Tensor:
    """Computes cos(theta + m) by angle addition, and what ``branch`` says where theta > pi - m."""
    cos_m, sin_m = torch.cos(m), torch.sin(m)
    phi = c * cos_m - safe_sin(c) * sin_m
    if branch == "none":
        return phi
    if branch == "easy":
        return torch.where(c > 0, phi, c)
    past = {
        "hard": c - m * sin_m, "keep": c, "continuous": c - 1 + cos_m, "monotone": -2 - phi,
        "clip": -torch.ones_like(c),
    }[branch]  # fmt: skip
    return torch.where(c > -cos_m, phi, past)


def arc_rotation(m: float, branch: str) -> Rotation:
    """Returns :func:`arc` of a number."""
    cos, sin = math.cos(m), math.sin(m)
    if branch == "none":
        return Rotation(cos, sin)
    if branch == "easy":
        return Rotation(cos, sin, threshold=0.0)
    past = {
        "hard": dict(shift=-m * sin), "keep": {}, "continuous": dict(shift=cos - 1),
        "monotone": dict(shift=-2.0, past_cosine=0.0, past_phi=-1.0),
        "clip": dict(shift=-1.0, past_cosine=0.0),
    }[branch]  # fmt: skip
    return Rotation(cos, sin, -cos, **past)


def _monotone_cos(a: Tensor) -> Tensor:
    """Computes (-1)^k cos(a) - 2k, k = floor(a / pi): a cosine that falls for all a >= 0."""
    k = torch.floor(a.detach() / math.pi)
    return (1 - 2 * torch.remainder(k, 2)) * torch.cos(a) - 2 * k


class NSoftmax(Margin):
    """Computes t = c, no margin: NormFace (Wang et al., 2017, arXiv:1704.06369).

    Usual values: scale 20 to 64, or learnable. With ``normalize="none"`` and a bias it is the plain
    softmax loss of a linear layer, with ``normalize="weight"`` SphereFace's "modified softmax".
    pytorch-metric-learning's NormalizedSoftmaxLoss has a temperature, the inverse of the scale.
    """

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        return c

    def rotation(self) -> Rotation:
        return Rotation()


class CosFace(ParametricMargin):
    """Computes t = c - m, -2 <= m <= 2: CosFace (Wang et al., 2018, arXiv:1801.09414), also
    AM-Softmax (Wang et al., 2018, arXiv:1801.05599).

    Usual values: m = 0.35 or 0.4 with scale 64 for faces, m = 0.2 with scale 30 for speakers. A
    negative m makes classes overlap, as for few-shot learning (Liu et al., 2020, arXiv:2003.12060).
    """

    interval = Interval(-2, 2)

    def __init__(self, m: float | Tensor = 0.4):
        super().__init__(m)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return c - m

    def rotation(self) -> Rotation | None:
        return None if isinstance(self.m, Tensor) else self.as_asked(Rotation(less=self.m))


AMSoftmax = CosFace


class ArcFace(ParametricMargin):
    """Computes t = cos(theta + m), 0 <= m < pi: ArcFace (Deng et al., 2019, arXiv:1801.07698).

    cos(theta + m) rises again for theta > pi - m; ``branch`` says what t is there:

    - "hard" (default): cos(theta) - m sin(m); the original MXNet ArcFace, pytorch-metric-learning,
      mmpretrain
    - "easy": the margin applies only where cos(theta) > 0, elsewhere t = c ("easy_margin" of many
      trainers)
    - "none": cos(theta + m) throughout; insightface arcface_torch, PaddlePaddle, OneFlow
    - "keep": cos(theta), no margin; catalyst
    - "continuous": cos(theta) - 1 - cos(pi - m), which meets cos(theta + m) at -1; wespeaker,
      3D-Speaker
    - "monotone": -2 - cos(theta + m), which does so too; Keras_insightface
    - "clip": -1, the cosine of min(theta + m, pi), without gradient; AdaFace's repository, which
      stops at pi - 1e-3, and with ``gradient="straight_through"`` opensphere, which stops at
      3.14159

    Usual values: m = 0.5 with scale 64 for faces, m = 0.2 with scale 32 for speakers.

    Args:
        m: additive angular margin in radians: a float, 0-d tensor or table (num_classes,).
        branch: see above.
        gradient: "exact", or "straight_through" as in today's arcface_torch; see
            :class:`ParametricMargin`.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self, m: float | Tensor = 0.5, *, branch: str | None = None, gradient: str = "exact"
    ):
        super().__init__(m, gradient)
        self.branch = "hard" if branch is None else branch
        if self.branch not in BRANCHES:
            raise ValueError(f"branch: expected one of {BRANCHES}, got {branch!r}")

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return arc(c, m, self.branch)

    def rotation(self) -> Rotation | None:
        if isinstance(self.m, Tensor):
            return None
        return self.as_asked(arc_rotation(self.m, self.branch))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branch={self.branch!r}"


class CombinedMargin(ParametricMargin):
    """Computes t = cos(m1 theta + m2) - m3: three margins in one (Deng et al., 2019,
    arXiv:1801.07698).

    For m1 = 1 the branches are those of :class:`ArcFace` with m = m2. For m1 != 1 there are "none"
    and "monotone", (-1)^k cos(a) - 2k with a = m1 theta + m2 and k = floor(a / pi), which falls on
    all of [0, pi]. ``branch=None`` is "hard" for m1 = 1 and else "monotone". m3 is subtracted after
    the branch. insightface's CombinedMarginLoss ignores m2 where m3 > 0; this one does not. Usual
    values: (m1, m2, m3) = (1, 0.3, 0.2) or (0.9, 0.4, 0.15) with scale 64.

    Args:
        m1: multiplicative angular margin, a positive number.
        m2: additive angular margin in radians, 0 <= m2 < pi: a float, 0-d tensor or table
            (num_classes,); the ``m`` of the base class and what ``row_margin`` replaces.
        m3: additive cosine margin, 0 <= m3 <= 2, a number.
        branch: see above.
        gradient: "exact" or "straight_through", see :class:`ParametricMargin`.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self,
        m1: float = 1.0,
        m2: float | Tensor = 0.5,
        m3: float = 0.0,
        *,
        branch: str | None = None,
        gradient: str = "exact",
    ):
        super().__init__(m2, gradient)
        self.m1 = number("m1", m1, above=0)
        self.m3 = number("m3", m3, least=0, most=2)
        allowed = BRANCHES if m1 == 1 else ("none", "monotone")
        self.branch = ("hard" if m1 == 1 else "monotone") if branch is None else branch
        if self.branch not in allowed:
            raise ValueError(f"branch: expected one of {allowed} for m1={m1:g}, got {branch!r}")

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        if self.m1 == 1:
            return arc(c, m, self.branch) - self.m3
        a = self.m1 * safe_acos(c) + m
        return (_monotone_cos(a) if self.branch == "monotone" else torch.cos(a)) - self.m3

    def rotation(self) -> Rotation | None:
        if isinstance(self.m, Tensor) or self.m1 != 1:
            return None
        return self.as_asked(arc_rotation(self.m, self.branch)._replace(less=self.m3))

    def extra_repr(self) -> str:
        return f"m1={self.m1:g}, {super().extra_repr()}, m3={self.m3:g}, branch={self.branch!r}"


class SphereFace(ParametricMargin):
    """Computes t = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi), m >= 1 real: SphereFace-R,
    SphereFace with normalised features (Liu et al., 2017 and 2021, arXiv:1704.08063,
    arXiv:2109.05565).

    Usual values: m = 1.35 with scale 64, m = 1.7 with scale 30. opensphere's
    SphereFace-R has the straight-through gradient; its projection of w onto the sphere at every
    step is left to the optimizer. What PLSC, pytorch-adacos and cvqluu's angular losses call
    SphereFace is cos(m theta), which rises again beyond pi / m: that is
    ``CombinedMargin(1.35, 0, 0, branch="none")``. :class:`ASoftmax` is SphereFace as published,
    which keeps |x|.
    """

    interval = Interval(1, 1e4)

    def __init__(self, m: float | Tensor = 1.35, *, gradient: str = "exact"):
        super().__init__(m, gradient)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return _monotone_cos(m * safe_acos(c))


class X2Softmax(ParametricMargin):
    """Computes t = a (theta - h)^2 + k: X2-Softmax (Xu et al., 2023, arXiv:2312.05281).

    It replaces the cosine by a parabola, which falls on all of [0, pi] for a < 0 and h <= 0. Its
    distance from the cosine, the margin, grows with the angle. k is the ``m`` of the base class:
    what a table or ``row_margin`` replaces. Usual values: those of the training script published
    with it, a = -0.9, h = 0, k = 0.65 with scale 64. Like that code this one has the
    straight-through gradient by default; the exact one is infinite at theta = pi, and at 0 unless
    h = 0, and bounded here.

    Args:
        a: curvature, -10000 <= a < 0.
        h: vertex in radians, -10000 <= h <= 0.
        k: height of the vertex, at most 10000 in size: a float, 0-d tensor or table (num_classes,).
        gradient: "straight_through" or "exact", see :class:`ParametricMargin`.
    """

    interval = Interval(-1e4, 1e4)

    def __init__(
        self,
        a: float = -0.9,
        h: float = 0.0,
        k: float | Tensor = 0.65,
        *,
        gradient: str = "straight_through",
    ):
        super().__init__(k, gradient)
        self.a = number("a", a, least=-1e4, below=0)
        self.h = number("h", h, least=-1e4, most=0)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        angle = safe_acos(c) - self.h
        return self.a * angle * angle + m

    def extra_repr(self) -> str:
        return f"a={self.a:g}, h={self.h:g}, {super().extra_repr()}"
