# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the base of margins with one parameter m: a number, a tensor or a table of the classes."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments, numerics, ops
from ..rotation import Rotation
from .base import Bounded, Margin, Rows, straight_through


class Interval:
    """Describes a range of finite numbers, whose upper end is open or closed.

    The text is put together at once, because torch.compile(dynamic=True) cannot put a float into a
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


class ParametricMargin(Margin):
    """Computes t = ``target(c, m)`` with a parameter m: a number, 0-d tensor or class table.

    A number may be reassigned at any time (``margin.m = 0.4``). A tensor is registered, as a
    parameter if it is an ``nn.Parameter``, so that it moves, saves and trains with the head. A
    ``row_margin`` in the call replaces ``m``. Subclasses set ``interval`` and define
    ``target(c, m) -> t``.

    ``gradient="exact"`` is the derivative of t. ``"straight_through"`` computes t without gradient
    and lets dt/dc = 1, as insightface arcface_torch does since December 2022. A learnable ``m``
    gets its gradient either way.
    """

    takes_row_margin = True
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

    def __setattr__(self, name: str, value: Any) -> None:
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

    def check(
        self,
        num_classes: int,
        device: torch.device | None = None,
        row_margin: Tensor | None = None,
    ) -> None:
        super().check(num_classes, device, row_margin)
        self.check_type()
        if not isinstance(self.m, Tensor):
            self.check_range()
        elif self.m.ndim == 1:
            if self.m.shape[0] != num_classes:
                raise ValueError(
                    f"margin: expected a table of {num_classes} classes, got {self.m.shape[0]}"
                )
            if device not in (None, self.m.device):
                raise ValueError(f"margin: expected a table on {device} as x, got {self.m.device}")

    def bounded(self, row_margin: Tensor | None) -> Bounded | None:
        value, name = (self.m, "margin") if row_margin is None else (row_margin, "row_margin")
        if not isinstance(value, Tensor):
            return None
        expected = f"{name}: expected {type(self).__name__}'s m in {self.interval.text}"
        return Bounded(value, self.interval.first, self.interval.last, expected)

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        m = self.of_rows(c, rows)
        return self.with_gradient(lambda cosine: self.target(cosine, m), c)

    def with_gradient(self, target: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
        """Returns ``target(c)`` with the gradient that the margin was asked for."""
        if self.gradient == "straight_through":
            return straight_through(target, c)
        return target(c)

    def as_asked(self, rotation: Rotation) -> Rotation:
        """Returns the rotation with the gradient that the margin was asked for."""
        return rotation._replace(exact=float(self.gradient == "exact"))

    def of_rows(self, c: Tensor, rows: Rows) -> Tensor:
        """Returns the m of each row, () or (N,), in c's type."""
        if rows.row_margin is not None:
            return rows.row_margin.to(c.dtype)
        if isinstance(self.m, Tensor):
            m = self.m if self.m.ndim == 0 else self.m[rows.label]
            return ops.snapshot(m).to(c.dtype)  # a schedule, or a projection, may move it
        return numerics.filled(self.m, torch.promote_types(c.dtype, torch.float32), c.device)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        """Returns t (N,) for the target cosines c (N,) and margins m, () or (N,)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        m = f"<{tuple(self.m.shape)} tensor>" if isinstance(self.m, Tensor) else f"{self.m:g}"
        return f"m={m}" if self.gradient == "exact" else f"m={m}, gradient={self.gradient!r}"


class SharedMargin(ParametricMargin):
    """Computes t = ``target(c, m)`` with one number m for all classes, and for their transform."""

    takes_row_margin = False
    m: float

    def check_type(self) -> None:
        """Raises TypeError unless ``m`` is a number."""
        arguments.number("m", self.m)

    def check(
        self,
        num_classes: int,
        device: torch.device | None = None,
        row_margin: Tensor | None = None,
    ) -> None:
        if row_margin is not None:
            name = type(self).__name__
            raise ValueError(f"row_margin: expected None for {name}, which has one m for all rows")
        super().check(num_classes, device)
