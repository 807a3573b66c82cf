# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Margins drawn at random: ElasticFace."""

import math

import torch
from torch import Tensor

from .base import Interval, Margin, Rows
from .target import arc


class ElasticFace(Margin):
    """t = cos(theta + m_i) or c - m_i, m_i from N(m, std^2) for each row and step: ElasticFace
    (Boutros et al., 2022, arXiv:2109.09416).

    ``plus=True`` is ElasticFace+: the margins drawn are dealt to the rows so that the smallest
    cosine to its class gets the largest. The published code applies the sorting permutation where
    its inverse is meant, which deals them at random with respect to the cosine; this follows the
    paper's text. In eval mode m_i = m. As published, "arc" is cos(theta + m) without a branch.
    Usual values: scale 64; m = 0.5 for "arc" and 0.35 for "cos" with std = 0.05, for "+" 0.0175 and
    0.025 (the configuration of the authors; the default of their class is 0.0125).

    Args:
        m: mean margin: a float, 0-d tensor or table (num_classes,).
        std: standard deviation of the margins.
        kind: "arc" or "cos".
        plus: see above.
        generator: of the random numbers, on the device of the features; its state is saved with
            the module. None: torch's default one. With classes split over ranks each draws for its
            own rows: seed it by the rank.
        gradient: "exact" or "straight_through", see :class:`Margin`.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self,
        m: float | Tensor = 0.5,
        std: float = 0.05,
        *,
        kind: str = "arc",
        plus: bool = False,
        generator: torch.Generator | None = None,
        gradient: str = "exact",
    ):
        super().__init__(m, gradient)
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind: expected 'arc' or 'cos', got {kind!r}")
        if not 0 <= std < math.inf:
            raise ValueError(f"std: expected a finite number >= 0, got {std}")
        self.std, self.kind, self.plus, self.generator = float(std), kind, bool(plus), generator

    def of_rows(self, c: Tensor, rows: Rows) -> Tensor:
        m = super().of_rows(c, rows)
        if not self.training:
            return m
        noise = self.std * (self.draw(c) if rows.noise is None else rows.noise).to(c.dtype)
        return m + (_by_difficulty(noise, c.detach(), rows.kept) if self.plus else noise)

    def draw(self, x: Tensor) -> Tensor:
        """Standard normal numbers, (N,), for N rows."""
        device = x.device
        return torch.randn(len(x), generator=self.generator, dtype=torch.float32, device=device)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return arc(c, m, "none") if self.kind == "arc" else c - m

    def get_extra_state(self) -> Tensor:
        """The generator's state, (0,) without one."""
        empty = torch.empty(0, dtype=torch.uint8)
        return empty if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        if self.generator is not None and state.numel() > 0:
            self.generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.std:g}, kind={self.kind!r}, plus={self.plus}"


def _by_difficulty(margins: Tensor, c: Tensor, kept: Tensor | None) -> Tensor:
    """The margins of the kept rows dealt anew: the greatest cosine gets the smallest."""
    if kept is not None:  # ignored rows keep to themselves, at the end of both orders
        margins = margins.masked_fill(~kept, math.inf)
        c = c.masked_fill(~kept, -math.inf)
    ascending = margins.sort().values
    dealt = torch.empty_like(margins).scatter(0, c.argsort(descending=True), ascending)
    return dealt if kept is None else dealt.masked_fill(~kept, 0)
