# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Margins: functions of a row's target cosine, in plain PyTorch on N numbers.

A margin is an ``nn.Module`` with ``forward(c, rows) -> t``: from the cosine c_i = cos(theta_i) of
row i and its target class to the t_i that takes its place, so that the target logit is scale t_i.
No kernel knows a margin. All angles and margins are in radians.
"""

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor, nn

# slopes of sin and acos are taken as if sin(theta) were at least this: bounded where they would be
# infinite, at |c| = 1
_SIN_MIN = 1e-4
_BRANCHES = ("hard", "easy", "none", "keep", "continuous", "monotone")


class Rows(NamedTuple):
    """What a margin may look at besides the cosine; (N,) tensors."""

    label: Tensor  # int64, valid class of each row (0 for rows that are ignored)
    x_norm: Tensor  # |x_i|
    w_norm: Tensor  # |w_y|
    row_margin: Tensor | None  # the margin that the call gave for each row


class Interval(NamedTuple):
    """A range of numbers, either end open or closed."""

    low: float
    high: float
    open_high: bool = False

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    @property
    def last(self) -> float:
        """The largest float inside."""
        return math.nextafter(self.high, -math.inf) if self.open_high else self.high


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """``value``, exactly, with the derivative ``slope`` with respect to ``c``."""
    return value + slope * (c - c.detach())


def safe_sin(c: Tensor) -> Tensor:
    """The sine of the angle with cosine ``c``, exact; slope bounded at and beyond |c| = 1."""
    cosine = c.detach()
    value = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(value, -cosine / value.clamp_min(_SIN_MIN), c)


def safe_acos(c: Tensor) -> Tensor:
    """The angle with cosine ``c``, exact; its slope is bounded at and beyond |c| = 1."""
    cosine = c.detach()
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(torch.atan2(sine, cosine), -1 / sine.clamp_min(_SIN_MIN), c)


def _arc(c: Tensor, m: Tensor, branch: str) -> Tensor:
    """cos(theta + m) by angle addition, and what ``branch`` says where theta > pi - m."""
    cos_m, sin_m = torch.cos(m), torch.sin(m)
    phi = c * cos_m - safe_sin(c) * sin_m
    if branch == "none":
        return phi
    if branch == "easy":
        return torch.where(c > 0, phi, c)
    past = {"hard": c - m * sin_m, "keep": c, "continuous": c - 1 + cos_m}[branch]
    return torch.where(c > -cos_m, phi, past)


def _monotone_cos(a: Tensor) -> Tensor:
    """(-1)^k cos(a) - 2k, k = floor(a / pi): the cosine, unfolded to fall for all a >= 0."""
    k = torch.floor(a.detach() / math.pi)
    return (1 - 2 * torch.remainder(k, 2)) * torch.cos(a) - 2 * k


class Margin(nn.Module):
    """Base of the margins with one parameter ``m``: a float, 0-d tensor or table (num_classes,).

    A number may be reassigned at any time (``margin.m = 0.4``); a tensor is registered, as a
    parameter if it is an ``nn.Parameter``, so it moves, saves and trains with the head. A
    ``row_margin`` in the call replaces ``m``. Subclasses set ``interval`` and define
    ``target(c, m) -> t``.

    ``gradient="exact"`` is the derivative of t; ``"straight_through"`` computes t without gradient
    and lets dt/dc = 1, as insightface arcface_torch does since December 2022 (a learnable ``m``
    gets its gradient either way).
    """

    interval = Interval(-math.inf, math.inf)

    def __init__(self, m: float | Tensor, gradient: str = "exact"):
        super().__init__()
        if gradient not in ("exact", "straight_through"):
            raise ValueError(f"gradient: expected 'exact' or 'straight_through', got {gradient!r}")
        self.gradient = gradient
        if isinstance(m, Tensor) and not isinstance(m, nn.Parameter):
            self.register_buffer("m", m)
        else:
            self.m = m
        self.check_type()
        if not isinstance(m, Tensor) or m.device.type == "cpu":
            self.check_range()

    def check_type(self) -> None:
        """Raises TypeError or ValueError unless ``m`` is a number or a tensor of a legal shape."""
        expected = "m: expected a number, or a floating tensor () or (num_classes,)"
        if not isinstance(self.m, Tensor):
            if not isinstance(self.m, numbers.Real):
                raise TypeError(f"{expected}, got {type(self.m).__name__}")
        elif self.m.ndim > 1 or self.m.numel() == 0 or not self.m.is_floating_point():
            raise ValueError(f"{expected}, got {self.m.dtype} {tuple(self.m.shape)}")

    def check_range(self) -> None:
        """Raises ValueError unless ``m`` lies in the margin's interval."""
        if isinstance(self.m, Tensor):
            low, high = (bound.item() for bound in self.m.detach().aminmax())
        else:
            low = high = self.m
        if not (self.interval.low <= low and high <= self.interval.last):
            wrong = high if self.interval.low <= low else low
            raise ValueError(f"{type(self).__name__}: expected m in {self.interval}, got {wrong}")

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        m = self.of_rows(c, rows)
        if self.gradient == "straight_through":
            return self.target(c.detach(), m) + (c - c.detach())
        return self.target(c, m)

    def of_rows(self, c: Tensor, rows: Rows) -> Tensor:
        """The margin of each row, () or (N,), in c's type."""
        if rows.row_margin is not None:
            return rows.row_margin.to(c.dtype)
        if isinstance(self.m, Tensor):
            return (self.m if self.m.ndim == 0 else self.m[rows.label]).to(c.dtype)
        # times one: torch.tensor(m) and torch.full would compile a graph for each value
        return torch.ones((), dtype=torch.float64, device=c.device) * self.m

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        is_tensor = isinstance(self.m, Tensor)
        m = f"m=<{tuple(self.m.shape)} tensor>" if is_tensor else f"m={self.m:g}"
        return m if self.gradient == "exact" else f"{m}, gradient={self.gradient!r}"


class NSoftmax(nn.Module):
    """No margin: t = c. NormFace (Wang et al., 2017, arXiv:1704.06369)."""

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        return c


class CosFace(Margin):
    """t = c - m, 0 <= m <= 2: CosFace (arXiv:1801.09414), also AM-Softmax (arXiv:1801.05599).

    Usual values: m = 0.35 or 0.4 with scale 64 for faces, m = 0.2 with scale 30 for speakers.
    """

    interval = Interval(0, 2)

    def __init__(self, m: float | Tensor = 0.4):
        super().__init__(m)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return c - m


AMSoftmax = CosFace


class ArcFace(Margin):
    """t = cos(theta + m), 0 <= m < pi. ArcFace (Deng et al., 2019, arXiv:1801.07698).

    cos(theta + m) rises again for theta > pi - m; ``branch`` says what t is there:

    - "hard" (default): cos(theta) - m sin(m); the original MXNet ArcFace, pytorch-metric-learning,
      mmpretrain
    - "easy": the margin applies only where cos(theta) > 0, elsewhere t = c ("easy_margin" of many
      trainers)
    - "none": cos(theta + m) throughout; insightface arcface_torch, PaddlePaddle, OneFlow
    - "keep": cos(theta), no margin; catalyst
    - "continuous": cos(theta) - 1 - cos(pi - m), which meets cos(theta + m) at -1; wespeaker,
      3D-Speaker

    Args:
        m: additive angular margin in radians: a float, 0-d tensor or table (num_classes,).
        branch: see above.
        gradient: "exact", or "straight_through" as in today's arcface_torch; see :class:`Margin`.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self, m: float | Tensor = 0.5, *, branch: str | None = None, gradient: str = "exact"
    ):
        super().__init__(m, gradient)
        self.branch = "hard" if branch is None else branch
        if self.branch not in _BRANCHES[:-1]:
            raise ValueError(f"branch: expected one of {_BRANCHES[:-1]}, got {branch!r}")

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return _arc(c, m, self.branch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branch={self.branch!r}"


class CombinedMargin(Margin):
    """t = cos(m1 theta + m2) - m3: three margins in one, from the ArcFace paper (arXiv:1801.07698).

    For m1 = 1 the branches are those of :class:`ArcFace` with m = m2. For m1 != 1 there are "none"
    and "monotone", (-1)^k cos(a) - 2k with a = m1 theta + m2 and k = floor(a / pi), which falls on
    all of [0, pi]. ``branch=None`` is "hard" for m1 = 1 and else "monotone". m3 is subtracted after
    the branch. insightface's CombinedMarginLoss ignores m2 where m3 > 0; this one does not.

    Args:
        m1: multiplicative angular margin, a positive number.
        m2: additive angular margin in radians, 0 <= m2 < pi: a float, 0-d tensor or table
            (num_classes,); the ``m`` of the base class and what ``row_margin`` replaces.
        m3: additive cosine margin, 0 <= m3 <= 2, a number.
        branch: see above.
        gradient: "exact" or "straight_through", see :class:`Margin`.
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
        if not 0 < m1 < math.inf:
            raise ValueError(f"m1: expected a positive number, got {m1}")
        if not 0 <= m3 <= 2:
            raise ValueError(f"m3: expected a number in [0, 2], got {m3}")
        allowed = _BRANCHES[:-1] if m1 == 1 else ("none", "monotone")
        self.m1, self.m3 = float(m1), float(m3)
        self.branch = ("hard" if m1 == 1 else "monotone") if branch is None else branch
        if self.branch not in allowed:
            raise ValueError(f"branch: expected one of {allowed} for m1={m1:g}, got {branch!r}")

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        if self.m1 == 1:
            return _arc(c, m, self.branch) - self.m3
        a = self.m1 * safe_acos(c) + m
        return (_monotone_cos(a) if self.branch == "monotone" else torch.cos(a)) - self.m3

    def extra_repr(self) -> str:
        return f"m1={self.m1:g}, {super().extra_repr()}, m3={self.m3:g}, branch={self.branch!r}"


class SphereFace(Margin):
    """t = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi), m >= 1 real: normalised SphereFace.

    SphereFace (Liu et al., 2017, arXiv:1704.08063) in the feature-normalised form of SphereFace-R
    (arXiv:2109.05565). Usual values: m = 1.35 with scale 64, m = 1.7 with scale 30. opensphere's
    SphereFace-R has the straight-through gradient; its projection of w onto the sphere at every
    step is left to the optimizer.
    """

    interval = Interval(1, math.inf, open_high=True)

    def __init__(self, m: float | Tensor = 1.35, *, gradient: str = "exact"):
        super().__init__(m, gradient)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return _monotone_cos(m * safe_acos(c))
