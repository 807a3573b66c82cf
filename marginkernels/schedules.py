# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""``MarginSchedule`` lets a margin grow while training runs."""

import math

import torch
from torch import Tensor

from .arguments import integer, module, number
from .margins import InterTopK, ParametricMargin, Wrapper


class MarginSchedule:
    """Sets a margin's ``m`` by the number of the step, as wespeaker's schedulers do.

    m is ``initial`` up to the step ``start``, ``final`` from ``finish`` on, and a ramp in between.
    With r = (step - start) / (finish - start) the ramp is initial + (final - initial) q. "linear"
    has q = r, and "exponential", which rises fast first, has q = 1 - 1000^-r.

    Call :meth:`step` after each training step, like the step of a learning-rate scheduler. Save the
    state with ``state_dict()``.

    Example::

        schedule = MarginSchedule(head.margin, initial=0.0, final=0.5, start=1000, finish=20_000)

    Args:
        margin: a margin with a number or 0-d tensor as ``m``; a tensor is filled in place. Of a
            margin that wraps such a one the m inside is set. The penalty of :class:`InterTopK`
            grows in proportion, to the one that it has now for ``final``, as in wespeaker, whose
            ``mp`` is the penalty for m = 0.2.
        initial, final: margins in the unit of ``m``.
        start, finish: steps, 0 <= start < finish.
        ramp: "exponential" or "linear".
    """

    def __init__(
        self,
        margin: ParametricMargin | Wrapper,
        *,
        initial: float = 0.0,
        final: float,
        start: int = 0,
        finish: int,
        ramp: str = "exponential",
    ):
        module("margin", margin, "ArcFace(0.5)")
        inner = margin.margin if isinstance(margin, Wrapper) else margin
        if not isinstance(inner, ParametricMargin) or getattr(inner.m, "ndim", 0) > 0:
            raise ValueError(
                "margin: expected a margin with a number or 0-d tensor as m, got "
                f"{type(inner).__name__}"
            )
        if ramp not in ("exponential", "linear"):
            raise ValueError(f"ramp: expected 'exponential' or 'linear', got {ramp!r}")
        start, finish = integer("start", start, least=0), integer("finish", finish)
        if not 0 <= start < finish:
            raise ValueError(f"start: expected 0 <= start < finish, got {start} and {finish}")
        # a value out of range is noticed now, not in an hour
        for name, m in (("initial", initial), ("final", final)):
            inner.interval.check(f"{name}: expected {type(inner).__name__}'s m", number(name, m))
        self.margin, self.initial, self.final = inner, float(initial), float(final)
        self._penalised, self._final_penalty = None, 0.0
        if isinstance(margin, InterTopK):
            if not 0 <= initial <= final or final == 0:
                raise ValueError(
                    "initial: expected 0 <= initial <= final and final > 0 with InterTopK, whose "
                    f"penalty grows in proportion, got {initial} and {final}"
                )
            self._penalised, self._final_penalty = margin, margin.penalty
        self.start, self.finish, self.ramp = start, finish, ramp
        self.current_step = 0
        self._set(self.initial)

    def value(self) -> float:
        """Returns the margin at the current step."""
        if self.current_step >= self.finish:
            return self.final
        ratio = max(0.0, (self.current_step - self.start) / (self.finish - self.start))
        share = ratio if self.ramp == "linear" else 1 - math.exp(-ratio * math.log(1000))
        return self.initial + (self.final - self.initial) * share

    def step(self) -> None:
        """Goes on by one step and sets the margin."""
        self.current_step += 1
        self._set(self.value())

    def state_dict(self) -> dict[str, int]:
        """Returns the number of the current step."""
        return {"current_step": self.current_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the step of a :meth:`state_dict` and sets the margin."""
        self.current_step = state["current_step"]
        self._set(self.value())

    def _set(self, m: float) -> None:
        if self._penalised is not None:
            self._penalised.penalty = self._final_penalty * m / self.final
        if isinstance(self.margin.m, Tensor):
            with torch.no_grad():
                self.margin.m.fill_(m)
        else:
            self.margin.m = m
