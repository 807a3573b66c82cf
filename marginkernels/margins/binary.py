# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the one-versus-rest losses, which judge each pair of a row and a class by itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import numerics
from ..arguments import integer, number
from ..transforms import Transform
from .base import Rows
from .parametric import Interval, SharedMargin
from .target import arc


class OneVersusRest(SharedMargin):
    """Computes losses a log(1 + exp(-z_y)) + b sum_j log(1 + exp(z_j)), with a learnable bias in
    all logits z.

    ``positive`` and ``negative`` are a and b. Subclasses set ``sign``, 1 or -1, of the bias. It is
    in the unit of the logits.
    """

    one_versus_rest = True
    needs_target_cosine = False
    sign = 1
    positive: float = 1.0
    negative: float = 1.0

    def __init__(self, m: float, bias: float):
        super().__init__(m)
        self._first_bias = bias
        self.bias = nn.Parameter(torch.tensor(bias))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restores the bias that training starts from."""
        super().reset_parameters()
        self.bias.fill_(self._first_bias)

    def bias_of_values(self, rows: Rows) -> Tensor:
        """Returns what the bias adds to each value, (): values times the scale are logits."""
        if rows.scale is None:
            raise ValueError(f"rows: expected a scale for {type(self).__name__}, got None")
        return self.sign * self.bias.to(rows.scale.dtype) / rows.scale

    def shift(self, rows: Rows) -> Tensor:
        return self.bias_of_values(rows)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        return super().forward(c, rows) + self.bias_of_values(rows).to(c.dtype)

    def combined(self, z_y: Tensor, total: Tensor, rows: Rows) -> Tensor:
        # not F.softplus, which drops exp(-z) beyond z = 20
        return self.negative * total - self.positive * F.logsigmoid(z_y)

    def transform(self, t: int, angle: Tensor, rows: Rows) -> Transform:
        """Returns the transform with this t and margin of the angle."""
        shift = self.shift(rows)
        power = numerics.filled(t, shift.dtype, shift.device)
        angle = angle.to(shift.dtype)
        return Transform("sphereface2", None, torch.stack([power, shift, angle.cos(), angle.sin()]))


class SphereFace2(OneVersusRest):
    """Computes t = g(c) - m, others g(c_j) + m, g(c) = 2 ((c + 1) / 2)^t - 1, one versus rest:
    SphereFace2 (Wen et al., 2022, arXiv:2108.01513).

    The loss of a row is weight (balance log(1 + exp(-z_y)) + (1 - balance) sum_j log(1 +
    exp(z_j))), with the logits z = scale t + bias. No softmax: each class is a binary
    classification of its own. With ``kind="A"`` the margin is that of the angle: t = g(cos(theta +
    m)), beyond theta = pi - m g(cos(theta) - 1 - cos(pi - m)), others g(cos(theta_j - m)).

    Usual values: m = 0.4 with scale 40, balance = 0.7, t = 3, weight = 50 / 40 for faces
    (opensphere, whose factor is lw / r), and m = 0.2 ("C") or 0.15 ("A") with scale 32 and weight 1
    for speakers (wespeaker). The bias starts from 0 in wespeaker, and from :meth:`first_bias` in
    opensphere. The gradient is that of the loss, as in wespeaker; opensphere's has dt/dc = 1.

    It takes no label smoothing, ``z_loss`` or ``focal_gamma``, which change a softmax.

    Args:
        m: margin, a number in [0, pi), of the cosine or the angle.
        kind: "C" (of the cosine) or "A" (of the angle).
        t: a positive integer, which spreads the similarities.
        balance: lambda, the share of the target, in [0, 1].
        bias: the number that the learnable bias starts from.
        weight: a factor of the loss, > 0.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self,
        m: float = 0.4,
        *,
        kind: str = "C",
        t: int = 3,
        balance: float = 0.7,
        bias: float = 0.0,
        weight: float = 1.0,
    ):
        if kind not in ("C", "A"):
            raise ValueError(f"kind: expected 'C' or 'A', got {kind!r}")
        super().__init__(m, number("bias", bias))
        self.kind, self.t = kind, integer("t", t)
        self.balance = number("balance", balance, least=0, most=1)
        self.weight = number("weight", weight, above=0)

    @property
    def positive(self) -> float:  # type: ignore[override]
        """Returns the factor of the target's term."""
        return self.weight * self.balance

    @property
    def negative(self) -> float:  # type: ignore[override]
        """Returns the factor of the other classes' terms."""
        return self.weight * (1 - self.balance)

    def first_bias(self, num_classes: int, scale: float) -> float:
        """Returns the bias at which target and other classes pull alike where all cosines are 0.

        opensphere starts from it: ``SphereFace2(bias=SphereFace2().first_bias(10_000, 40.0))``.
        """
        others = integer("num_classes", num_classes, least=2) - 1
        scale = number("scale", scale, above=0)
        balance = number("balance", self.balance, above=0, below=1)
        right = torch.zeros((), dtype=torch.float64)  # the cosine
        m = right + self.m
        target = scale * self.target(right, m).item()
        other = scale * (self._spread(m.sin()) if self.kind == "A" else self._spread(right) + m)
        return _balancing(balance / ((1 - balance) * others), target, other.item())

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        if self.kind == "A":
            return self._spread(arc(c, m, "continuous"))
        return self._spread(c) - m

    def _spread(self, c: Tensor) -> Tensor:
        return 2 * ((c + 1) / 2) ** self.t - 1

    def shift(self, rows: Rows) -> Tensor:
        bias = self.bias_of_values(rows)
        return bias + self.m if self.kind == "C" else bias

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        m = self.of_rows(c, rows)
        return self.transform(self.t, m if self.kind == "A" else torch.zeros_like(m), rows)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kind={self.kind!r}, t={self.t}, balance={self.balance:g}, "
            f"weight={self.weight:g}"
        )


class UnifiedCE(OneVersusRest):
    """Computes t = c - m, others c_j, one versus rest, all less a learnable threshold: the unified
    cross-entropy of UniFace (Zhou et al., ICCV 2023).

    The loss of a row is log(1 + exp(-z_y)) + negative sum_j log(1 + exp(z_j)), with the logits z =
    scale t - bias. So one threshold, bias / scale, divides the cosines of all rows to their own
    class from all others. Usual values: m = 0.4, negative = 1, rate = 1, scale 64. The
    authors' code limits the logits to [-scale, scale], which stops the gradient outside; this one
    does not.

    It takes no label smoothing, ``z_loss`` or ``focal_gamma``, which change a softmax.

    Args:
        num_classes: C. The bias starts from log(10 C rate).
        m: additive cosine margin, a number in [0, 2].
        negative: weight of the other classes, >= 0, the authors' l.
        rate: the authors' r, > 0: the share of the classes that is swept.
    """

    interval = Interval(0, 2)
    sign = -1

    def __init__(
        self, num_classes: int, m: float = 0.4, *, negative: float = 1.0, rate: float = 1.0
    ):
        num_classes = integer("num_classes", num_classes)
        rate = number("rate", rate, above=0)
        negative = number("negative", negative, least=0)
        super().__init__(m, math.log(10 * num_classes * rate))
        self.negative = negative

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return c - m

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        return self.transform(1, torch.zeros_like(self.of_rows(c, rows)), rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative={self.negative:g}"


def _balancing(ratio: float, target: float, other: float) -> float:
    """Returns the b with ratio sigmoid(-(target + b)) = sigmoid(other + b), target <= other."""
    root = math.sqrt((1 - ratio) ** 2 + 4 * ratio * math.exp(target - other))
    if ratio < 1:  # the other form would cancel
        return math.log(2 * ratio) - other - math.log(1 - ratio + root)
    return math.log(ratio - 1 + root) - math.log(2) - target
