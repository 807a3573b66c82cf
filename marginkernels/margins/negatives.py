# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the losses that change the other classes' logits too, by a transform of their cosines."""

import math

import torch
from torch import Tensor

from .. import arguments
from ..transforms import Transform, constants
from .angles import safe_acos
from .base import Rows
from .parametric import Interval, ParametricMargin, SharedMargin
from .statistics import Stateful, masked_mean, moved_average
from .target import BRANCHES, ArcFace, arc


class AirFace(ParametricMargin):
    """Computes t = 1 - 2 (theta + m) / pi, others 1 - 2 theta_j / pi: Li-ArcFace, AirFace (Li et
    al., 2019, arXiv:1907.12256).

    Linear in the angle for every class, target or not, so it falls for all theta and needs no
    branch. The slope 2 / (pi sin(theta)) is bounded at |c| = 1. Usual values: m = 0.4 as in the
    paper or 0.45, scale 64. Keras_insightface's AirFaceLoss changes the target
    alone and is another loss.

    Args:
        m: additive angular margin in radians: a float, 0-d tensor or table (num_classes,).
    """

    interval = Interval(0, math.pi, open_high=True)
    needs_target_cosine = False

    def __init__(self, m: float | Tensor = 0.4):
        super().__init__(m)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return 1 - 2 / math.pi * (safe_acos(c) + m)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        return Transform("airface")


class MVSoftmax(ParametricMargin):
    """Computes t = c - m ("am") or cos(theta + m) ("arc") by the branch, others (t + 1) c_j + t
    where misclassified: MV-Softmax (Wang et al., 2020, arXiv:1912.00833).

    A class is misclassified, a support vector, if its cosine exceeds c_y - m ("am") or
    cos(theta_y + m) ("arc"). This is the paper's adaptive weight, exp(s t (c_j + 1)). Usual values:
    m = 0.35 with "am", 0.5 with "arc", t = 0.2, scale 32: those of the authors' SV-X-Softmax
    (FaceX-Zoo has t = 0.12).

    ``branch`` says where the target has its margin. Elsewhere t = c. Without a branch training has
    been seen to diverge. "arc" has those of :class:`ArcFace`, "am" has three:

    - "above_m" (default of "am"): c > m; FaceX-Zoo
    - "easy" (default of "arc"): c > 0; the authors' code for both kinds
    - "none": everywhere; the paper

    Args:
        m: margin: a float, 0-d tensor or table (num_classes,).
        kind: "am" or "arc".
        branch: see above.
        t: how much misclassified classes are emphasised, a number >= 0.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self,
        m: float | Tensor = 0.35,
        *,
        kind: str = "am",
        branch: str | None = None,
        t: float = 0.2,
    ):
        super().__init__(m)
        if kind not in ("am", "arc"):
            raise ValueError(f"kind: expected 'am' or 'arc', got {kind!r}")
        allowed = ("above_m", "easy", "none") if kind == "am" else BRANCHES
        self.branch = ("above_m" if kind == "am" else "easy") if branch is None else branch
        if self.branch not in allowed:
            raise ValueError(f"branch: expected one of {allowed} for {kind!r}, got {branch!r}")
        self.kind, self.t = kind, arguments.number("t", t, least=0)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        if self.kind == "arc":
            return arc(c, m, self.branch)
        if self.branch == "none":
            return c - m
        return torch.where(c > (m if self.branch == "above_m" else 0), c - m, c)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        m = self.of_rows(c, rows)
        threshold = c - m if self.kind == "am" else arc(c, m, "none")
        return Transform("mv_softmax", threshold, constants(c, self.t))

    def extra_repr(self) -> str:
        settings = f"kind={self.kind!r}, branch={self.branch!r}, t={self.t:g}"
        return f"{super().extra_repr()}, {settings}"


class Circle(SharedMargin):
    """Computes t = a (c - 1 + m) with a = max(1 + m - c, 0), others a_j (c_j - m) with a_j =
    max(c_j + m, 0): Circle loss for classes (Sun et al., 2020, arXiv:2002.10857).

    The weights a and a_j are taken as constants in the gradient. So each similarity is pulled to
    its optimum, 1 + m for the target and -m for the others, the harder the farther it is. A row
    decides at the circle (c - 1)^2 + c_j^2 = 2 m^2. The scale is the paper's gamma. Usual values:
    m = 0.25 with scale 256 for faces (the paper, FaceX-Zoo), m = 0.35 with scale 64 in fast-reid.

    Args:
        m: relaxation, a number in [0, 1].
    """

    interval = Interval(0, 1)
    needs_target_cosine = False

    def __init__(self, m: float = 0.25):
        super().__init__(m)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return (1 + m - c.detach()).clamp_min(0) * (c - 1 + m)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        return Transform("circle", None, constants(rows.x_norm, self.m))


class CurricularFace(Stateful, ArcFace):
    """Computes t = cos(theta + m) with the hard branch, others c_j (t + c_j) where c_j >
    cos(theta_y + m): CurricularFace (Huang et al., 2020, arXiv:2004.00288).

    The buffer ``t`` is the moving average of the target cosines, from 0. In training mode it
    includes the present batch. So hard classes count for little while training starts, and for more
    later.
    Hard is what exceeds cos(theta_y + m) itself, not the value of the branch. Usual values: m =
    0.5, scale 64, alpha = 0.01 (TFace: 0.1).

    Args:
        m: additive angular margin in radians: a float, 0-d tensor or table (num_classes,).
        alpha: share of the new batch in t, in [0, 1].
    """

    t: Tensor

    def __init__(self, m: float | Tensor = 0.5, *, alpha: float = 0.01):
        super().__init__(m)
        self.alpha = arguments.number("alpha", alpha, least=0, most=1)
        self.remember(t=0.0)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        if self.training:  # and the sweep has accepted the batch
            self.t.copy_(self._present_t(c.detach(), rows))
        return super().forward(c, rows)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        threshold = arc(c, self.of_rows(c, rows), "none")
        return Transform("curricular", threshold, self._present_t(c, rows).reshape(1))

    def _present_t(self, c: Tensor, rows: Rows) -> Tensor:
        t = self.recall("t")
        if not self.training:
            return t
        mean, count = masked_mean(c, rows.kept)
        return moved_average(t, mean, self.alpha, count > 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}"


class ArcNegFace(ArcFace):
    """Computes t = cos(theta + m) with the hard branch, others t_j c_j + t_j - 1, t_j = alpha
    exp(-(c_j - t)^2 / sigma): ArcNegFace (Liu et al., 2019, arXiv:1909.00632).

    Classes whose cosine is near the target's margined one are weighted up, far ones down; t_j is
    taken as a constant in the gradient. Usual values: m = 0.5, scale 64, alpha = 1.2, sigma = 2, as
    FaceX-Zoo has them.

    Args:
        m: additive angular margin in radians: a float, 0-d tensor or table (num_classes,).
        alpha, sigma: height and width of the weight, positive numbers.
    """

    def __init__(self, m: float | Tensor = 0.5, *, alpha: float = 1.2, sigma: float = 2.0):
        super().__init__(m)
        self.alpha = arguments.number("alpha", alpha, above=0)
        self.sigma = arguments.number("sigma", sigma, above=0)

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        target = self.target(c, self.of_rows(c, rows))
        return Transform("arc_negative", target, constants(c, self.alpha, self.sigma))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}, sigma={self.sigma:g}"
