# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the margins that depend on the norm of the features: AdaFace, MagFace."""

import math

import torch
from torch import Tensor

from ..arguments import boolean, number
from .angles import safe_acos
from .base import Margin, Rows
from .parametric import Interval, ParametricMargin
from .statistics import Stateful, masked_mean, masked_std, moved_average
from .target import BRANCHES, arc


class AdaFace(Stateful, ParametricMargin):
    """Computes t = cos(theta - m q) - m - m q, q = clip(h (|x| - mean) / std, -1, 1): AdaFace (Kim
    et al., 2022, arXiv:2204.00964).

    The quality q of a row is where its feature norm lies among those of recent batches: for q = -1
    (low norm) the margin is ArcFace's, for q = 0 CosFace's, and for q = 1 the difficult rows weigh
    most. No gradient flows through q. Norms are clipped to [0.001, 100], the angle theta - m q to
    [0.001, pi - 0.001], so that a row of high quality within m q of its class is pulled no further.
    ``clip=False`` leaves the angle as it is.
    Usual values: m = 0.4, h = 0.333, scale 64.

    ``batch_mean`` and ``batch_std`` are moving averages, updated in training mode before they are
    used; a batch of one row leaves them. t_alpha, the share of the new batch, is 0.01 as in the
    authors' training script (their class has 1, no memory). Unlike the authors' code this one does
    not clamp all cosines to 0.999 in size, which stops the gradient of confident rows.
    CVLface has ``clip=False`` and ``gradient="straight_through"``.

    Args:
        m: a float, 0-d tensor or table (num_classes,).
        h: how much of the spread of the norms makes q = 1.
        t_alpha: share of the new batch in the moving averages, in (0, 1].
        clip: whether the angle is clipped.
        gradient: "exact" or "straight_through", see :class:`ParametricMargin`.
    """

    interval = Interval(0, 1)
    _EPSILON = 1e-3
    batch_mean: Tensor
    batch_std: Tensor

    def __init__(
        self,
        m: float | Tensor = 0.4,
        *,
        h: float = 0.333,
        t_alpha: float = 0.01,
        clip: bool = True,
        gradient: str = "exact",
    ):
        super().__init__(m, gradient)
        boolean("clip", clip)
        self.clip = clip
        self.h = number("h", h, above=0)
        self.t_alpha = number("t_alpha", t_alpha, above=0, most=1)
        self.remember(batch_mean=20.0, batch_std=100.0)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        m, quality = self.of_rows(c, rows), self.quality(rows).to(c.dtype)

        def target(cosine: Tensor) -> Tensor:
            angle = safe_acos(cosine) - m * quality
            if self.clip:
                angle = angle.clamp(self._EPSILON, math.pi - self._EPSILON)
            return torch.cos(angle) - m - m * quality

        return self.with_gradient(target, c)

    @torch.no_grad()
    def quality(self, rows: Rows) -> Tensor:
        """Returns q of each row, (N,) in [-1, 1]. In training mode the statistics move first."""
        norm = rows.x_norm.clamp(0.001, 100)
        mean, std = self.recall("batch_mean"), self.recall("batch_std")
        if self.training:
            new_mean, count = masked_mean(norm, rows.kept)
            new_std, _ = masked_std(norm, rows.kept)
            mean = moved_average(mean, new_mean, self.t_alpha, count > 1)
            std = moved_average(std, new_std, self.t_alpha, count > 1)
            self.batch_mean.copy_(mean)
            self.batch_std.copy_(std)
        return (self.h * (norm - mean) / (std + self._EPSILON)).clamp(-1, 1)

    def extra_repr(self) -> str:
        settings = f"h={self.h:g}, t_alpha={self.t_alpha:g}, clip={self.clip}"
        return f"{super().extra_repr()}, {settings}"


class MagFace(Margin):
    """Computes t = cos(theta + m(a)), a = clip(|x|, l_a, u_a), m(a) linear from l_m to u_m: MagFace
    (Meng et al., 2021, arXiv:2103.06627).

    Adds the regulariser lambda_g (a / u_a^2 + 1 / a) to each row's loss, which rewards large norms.
    Both have their gradient to |x|, 0 outside [l_a, u_a]. Usual values: the defaults with scale 64;
    lambda_g is 35 in the paper, 20 in the authors' script (the script adds lambda_g times the
    batch mean, as reduction="mean" does here without sample weights). ``branch`` is ArcFace's, by
    default "easy" as in the authors' code.

    Args:
        l_a, u_a: range of the norms.
        l_m, u_m: margins at its ends, radians.
        lambda_g: weight of the regulariser.
        branch: "easy", or another of :class:`ArcFace`.
    """

    def __init__(
        self,
        l_a: float = 10.0,
        u_a: float = 110.0,
        l_m: float = 0.45,
        u_m: float = 0.8,
        *,
        lambda_g: float = 35.0,
        branch: str = "easy",
    ):
        super().__init__()
        self.l_a, self.u_a = number("l_a", l_a, above=0), number("u_a", u_a, above=0)
        self.l_m = number("l_m", l_m, least=0, below=math.pi)
        self.u_m = number("u_m", u_m, least=0, below=math.pi)
        self.lambda_g = number("lambda_g", lambda_g, least=0)
        if not l_a < u_a:
            raise ValueError(f"l_a: expected 0 < l_a < u_a, got l_a={l_a}, u_a={u_a}")
        if not l_m <= u_m:
            raise ValueError(f"l_m: expected 0 <= l_m <= u_m < pi, got l_m={l_m}, u_m={u_m}")
        if branch not in BRANCHES:
            raise ValueError(f"branch: expected one of {BRANCHES}, got {branch!r}")
        self.branch = branch

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        m = self.l_m + slope * (rows.x_norm.clamp(self.l_a, self.u_a) - self.l_a)
        return arc(c, m.to(c.dtype), self.branch)

    def regularizer(self, rows: Rows) -> Tensor:
        """Computes lambda_g (a / u_a^2 + 1 / a), (N,)."""
        a = rows.x_norm.clamp(self.l_a, self.u_a)
        return self.lambda_g * (a / self.u_a**2 + 1 / a)

    def extra_repr(self) -> str:
        return (
            f"l_a={self.l_a:g}, u_a={self.u_a:g}, l_m={self.l_m:g}, u_m={self.u_m:g}, "
            f"lambda_g={self.lambda_g:g}, branch={self.branch!r}"
        )
