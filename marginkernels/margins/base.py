# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Margins: functions of a row's target cosine, in plain PyTorch on N numbers.

A margin is an ``nn.Module`` with ``forward(c, rows) -> t``: from the cosine c_i = cos(theta_i) of
row i and its target class to the t_i that takes its place, so that the target logit is scale t_i.
No kernel knows a margin. All angles and margins are in radians.

A margin may also have

- ``negatives(c, rows) -> Transform``, what becomes of the cosines to the other classes (see
  :mod:`marginkernels.transforms`). It is called before the sweep, without gradient; c is the
  target's cosine, or None where ``needs_target_first = False``.
- ``regularizer(rows) -> Tensor`` () or (N,), added to the rows' losses.
- ``draw(x) -> Tensor`` (N,), random numbers that it needs for each row of x (N, D). With classes
  split over ranks it is called in training mode by the row's own rank, and the others get the
  numbers in ``rows.noise``.
- state: registered buffers, changed in training mode only. c and rows are those of the whole batch,
  over all processes, so statistics of them are global; ``rows.kept`` leaves out ignored rows.
  :class:`marginkernels.margins.statistics.Stateful` is the base to derive from: compilers and
  ``torch.utils.checkpoint`` compute anew what they have not saved, also from a buffer that has
  moved.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import arguments, ops
from ..numerics import LEAST_SINE


class Rows(NamedTuple):
    """What a margin may look at besides the cosine; (N,) tensors."""

    label: Tensor  # int64, valid class of each row (0 for rows that are ignored)
    x_norm: Tensor  # |x_i|
    w_norm: Tensor | None  # |w_y|; None before the sweep, in ``negatives``
    row_margin: Tensor | None  # the margin that the call gave for each row
    kept: Tensor | None = None  # bool, whether the row takes part; None: all do
    noise: Tensor | None = None  # what ``draw`` gave; None: the margin draws it now


class Interval:
    """A range of finite numbers, its upper end open or closed.

    All is put together at once, because torch.compile(dynamic=True) cannot put a float into a
    string.
    """

    def __init__(self, low: float, high: float, open_high: bool = False):
        self.text = f"[{low:g}, {high:g}{')' if open_high else ']'}"
        last = math.nextafter(high, -math.inf) if open_high else high
        # the smallest and the largest float inside
        self.first, self.last = max(low, -sys.float_info.max), min(last, sys.float_info.max)

    def __str__(self) -> str:
        return self.text

    def check(self, expected: str, *values: float) -> None:
        """Raises ValueError for the first value outside; its message begins with ``expected``."""
        for value in values:
            if not self.first <= value <= self.last:
                raise ValueError(f"{expected} in {self}, got {value}")


def _with_slope(value: Tensor, slope: Tensor, c: Tensor) -> Tensor:
    """``value``, exactly, with the derivative ``slope`` with respect to ``c``."""
    return value + slope * (c - c.detach())


def safe_sin(c: Tensor) -> Tensor:
    """The sine of the angle with cosine ``c``, exact; slope bounded at and beyond |c| = 1."""
    cosine = c.detach()
    value = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(value, -cosine / value.clamp_min(LEAST_SINE), c)


def safe_acos(c: Tensor) -> Tensor:
    """The angle with cosine ``c``, exact; its slope is bounded at and beyond |c| = 1."""
    cosine = c.detach()
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(0).sqrt()
    return _with_slope(torch.atan2(sine, cosine), -1 / sine.clamp_min(LEAST_SINE), c)


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
    _given_m: Tensor | None = None

    def __init__(self, m: float | Tensor, gradient: str = "exact"):
        super().__init__()
        if gradient not in ("exact", "straight_through"):
            raise ValueError(f"gradient: expected 'exact' or 'straight_through', got {gradient!r}")
        self.gradient = gradient
        self.m = m
        self.check_type()
        if not isinstance(m, Tensor) or m.device.type == "cpu":
            self.check_range()

    def __setattr__(self, name, value):
        if name == "m":
            arguments.replace(self, name, value)
            if arguments.is_number(value) and not isinstance(value, float | int):
                value = float(value)  # a numpy number
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Restores ``m`` where it is a tensor, as it was given or last assigned."""
        arguments.restore(f"{type(self).__name__}: m", self.m, self._given_m)

    def check_type(self) -> None:
        """Raises TypeError or ValueError unless ``m`` is a number or a tensor of a legal shape."""
        expected = "m: expected a number, or a floating tensor () or (num_classes,)"
        if not isinstance(self.m, Tensor):
            if not arguments.is_number(self.m):
                raise TypeError(f"{expected}, got {type(self.m).__name__}")
        elif self.m.ndim > 1 or self.m.numel() == 0 or not self.m.is_floating_point():
            raise ValueError(f"{expected}, got {self.m.dtype} {tuple(self.m.shape)}")

    def check_range(self) -> None:
        """Raises ValueError unless ``m`` lies in the margin's interval."""
        if isinstance(self.m, Tensor):
            ends = [bound.item() for bound in self.m.detach().aminmax()]
        else:
            ends = [self.m]
        self.interval.check(f"{type(self).__name__}: expected m", *ends)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        m = self.of_rows(c, rows)
        return self.with_gradient(lambda cosine: self.target(cosine, m), c)

    def with_gradient(self, target: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
        """``target(c)`` with the gradient that the margin was asked for."""
        if self.gradient == "straight_through":
            return target(c.detach()) + (c - c.detach())
        return target(c)

    def of_rows(self, c: Tensor, rows: Rows) -> Tensor:
        """The margin of each row, () or (N,), in c's type."""
        if rows.row_margin is not None:
            return rows.row_margin.to(c.dtype)
        if isinstance(self.m, Tensor):
            m = self.m if self.m.ndim == 0 else self.m[rows.label]
            return ops.snapshot(m).to(c.dtype)  # a schedule, or a projection, may move it
        # times one: torch.tensor(m) and torch.full would compile a graph for each value
        dtype = torch.promote_types(c.dtype, torch.float32)
        return torch.ones((), dtype=dtype, device=c.device) * self.m

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        is_tensor = isinstance(self.m, Tensor)
        m = f"m=<{tuple(self.m.shape)} tensor>" if is_tensor else f"m={self.m:g}"
        return m if self.gradient == "exact" else f"{m}, gradient={self.gradient!r}"


class NSoftmax(nn.Module):
    """t = c, no margin: NormFace (Wang et al., 2017, arXiv:1704.06369).

    Usual values: scale 20 to 64, or learnable. With ``normalize="none"`` and a bias it is the plain
    softmax loss of a linear layer, with ``normalize="weight"`` SphereFace's "modified softmax".
    pytorch-metric-learning's NormalizedSoftmaxLoss has a temperature, the inverse of the scale.
    """

    takes_row_margin = False

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        return c
