# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds L-Softmax and A-Softmax, which multiply the angle, annealed from the softmax loss."""

import math

import torch
from torch import Tensor

from ..arguments import integer, number
from .base import Margin, Rows
from .statistics import Stateful


def _monotone_multiple(c: Tensor, m: int) -> Tensor:
    """Computes psi = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi), as polynomials in c."""
    previous, chebyshev = torch.ones_like(c), c  # cos(m theta) = T_m(c)
    for _ in range(m - 1):
        previous, chebyshev = chebyshev, 2 * c * chebyshev - previous
    # compared with constants, not by floor(acos): the pieces meet there, so either side is right
    k = sum((c < math.cos(j * math.pi / m)).to(c.dtype) for j in range(1, m))
    return torch.where(torch.as_tensor(k % 2 == 0), chebyshev, -chebyshev) - 2 * k


class _Annealed(Stateful, Margin):
    """Computes t = (lambda c + psi(theta)) / (1 + lambda).

    At the i-th forward in training mode lambda = max(low, base (1 + gamma i)^-power). i is a
    buffer.
    """

    iteration: Tensor

    def __init__(self, m: int, base: float, gamma: float, power: float, low: float):
        super().__init__()
        self.m = integer("m", m)
        self.base, self.gamma, self.power, self.low = (
            number(name, value, least=0)
            for name, value in dict(base=base, gamma=gamma, power=power, low=low).items()
        )
        self.remember(iteration=0)

    def annealing(self) -> Tensor:
        """Returns the present lambda, (), in the default dtype."""
        return self._annealing(self.iteration.to(torch.get_default_dtype()))

    def _annealing(self, iteration: Tensor) -> Tensor:
        decay = (1 + self.gamma * iteration) ** -self.power
        return (self.base * decay).clamp_min(self.low)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        iteration = self.recall("iteration")
        if self.training:
            iteration = iteration + 1
            self.iteration.copy_(iteration)
        weight = self._annealing(iteration.to(c.dtype))
        return (weight * c + _monotone_multiple(c, self.m)) / (1 + weight)

    def extra_repr(self) -> str:
        return (
            f"m={self.m}, base={self.base:g}, gamma={self.gamma:g}, power={self.power:g}, "
            f"low={self.low:g}"
        )


class LSoftmax(_Annealed):
    """Computes t = (lambda c + psi) / (1 + lambda), psi = (-1)^k cos(m theta) - 2k: L-Softmax (Liu
    et al., 2016, arXiv:1612.02295).

    For ``normalize="none"``, scale 1, no bias: the target logit is |x| |w_y| t, the others are
    w_j x, and gradients flow to both norms. lambda = max(low, base (1 + gamma i)^-power) falls
    with the iteration i, which is saved with the module. Usual values: m = 2 to 4, with the
    annealing of the authors' Caffe example, the default. pytorch-metric-learning's
    LargeMarginSoftmaxLoss has none: ``base=0``.

    Args:
        m: an integer >= 1, the multiple of the angle.
        base, gamma, power, low: the annealing of lambda.
    """

    def __init__(
        self,
        m: int = 4,
        *,
        base: float = 1000.0,
        gamma: float = 2.5e-5,
        power: float = 35.0,
        low: float = 0.0,
    ):
        super().__init__(m, base, gamma, power, low)


class ASoftmax(_Annealed):
    """Computes t = (lambda c + psi) / (1 + lambda), psi = (-1)^k cos(m theta) - 2k: A-Softmax,
    SphereFace as published (Liu et al., 2017, arXiv:1704.08063).

    For ``normalize="weight"``, scale 1, no bias: the target logit is |x| t, the others are |x| c_j,
    and gradients flow to |x|. lambda as in :class:`LSoftmax`. Usual values: m = 4, lambda from 1000
    (1500 with gamma 0.1 in sphereface_pytorch) down to 5. The gradient is that of
    the loss; the authors' Caffe layer rescales it, and pytorch-metric-learning's SphereFaceLoss
    does not anneal. :class:`SphereFace` is the form with normalised features.

    Args:
        m: an integer >= 1, the multiple of the angle.
        base, gamma, power, low: the annealing of lambda.
    """

    def __init__(
        self,
        m: int = 4,
        *,
        base: float = 1000.0,
        gamma: float = 0.12,
        power: float = 1.0,
        low: float = 5.0,
    ):
        super().__init__(m, base, gamma, power, low)
