# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds margins that are drawn at random: ElasticFace."""

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import integer, number
from ..generators import StepGenerators, process_rank, without_unused
from .base import Rows
from .parametric import Interval, ParametricMargin
from .target import arc


class ElasticFace(ParametricMargin):
    """Computes t = cos(theta + m_i) or c - m_i, m_i from N(m, std^2) for each row and step:
    ElasticFace (Boutros et al., 2022, arXiv:2109.09416).

    ``plus=True`` is ElasticFace+: the margins drawn are dealt to the rows so that the smallest
    cosine to its class gets the largest. The published code applies the sorting permutation where
    its inverse is meant, which deals them at random with respect to the cosine; this follows the
    paper's text. In eval mode m_i = m. As published, "arc" is cos(theta + m) without a branch.
    Usual values: scale 64; m = 0.5 for "arc" and 0.35 for "cos" with std = 0.05, for "+" 0.0175 and
    0.02 (the configuration of the authors; the default of their class is 0.0125).

    Args:
        m: mean margin: a float, 0-d tensor or table (num_classes,).
        std: standard deviation of the margins.
        kind: "arc" or "cos".
        plus: see above.
        seed: starts a generator of the margin's own, an integer in [0, 2^63). The numbers of a
            training step follow from the seed, the process's rank and the number of the step, which
            is saved. ``torch.compile`` breaks its graph for them. None: torch's default generator,
            and nothing is saved.
        gradient: "exact" or "straight_through", see :class:`ParametricMargin`.
    """

    interval = Interval(0, math.pi, open_high=True)

    def __init__(
        self,
        m: float | Tensor = 0.5,
        std: float = 0.05,
        *,
        kind: str = "arc",
        plus: bool = False,
        seed: int | None = None,
        gradient: str = "exact",
    ):
        super().__init__(m, gradient)
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind: expected 'arc' or 'cos', got {kind!r}")
        self.std, self.kind, self.plus = number("std", std, least=0), kind, bool(plus)
        self.generators = None
        if seed is not None:
            seed = integer("seed", seed, least=0, most=2**63 - 1)
            self.generators = StepGenerators(seed, "ElasticFace(seed=)")

    def of_rows(self, c: Tensor, rows: Rows) -> Tensor:
        m = super().of_rows(c, rows)
        if not self.training:
            return m
        noise = self.std * (self.draw(c, process_rank()) if rows.noise is None else rows.noise).to(
            c.dtype
        )
        return m + (_by_difficulty(noise, c.detach(), rows.kept) if self.plus else noise)

    def draw(self, x: Tensor, rank: int = 0) -> Tensor:
        """Draws standard normal numbers, (N,)."""
        generator = None if self.generators is None else self.generators(x.device, rank)
        # not torch.randn: torch.compile takes no generator=None beside a size that is not fixed
        numbers = torch.empty(len(x), dtype=torch.float32, device=x.device)
        return numbers.normal_(generator=generator)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict = without_unused(state_dict, prefix + "generators", self.generators)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def target(self, c: Tensor, m: Tensor) -> Tensor:
        return arc(c, m, "none") if self.kind == "arc" else c - m

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.std:g}, kind={self.kind!r}, plus={self.plus}"


def _by_difficulty(margins: Tensor, c: Tensor, kept: Tensor | None) -> Tensor:
    """Deals the margins of the kept rows anew: the greatest cosine gets the smallest."""
    if kept is not None:  # ignored rows keep to themselves, at the end of both orders
        margins = margins.masked_fill(~kept, math.inf)
        c = c.masked_fill(~kept, -math.inf)
    ascending = margins.sort().values
    dealt = torch.empty_like(margins).scatter(0, c.argsort(descending=True), ascending)
    return dealt if kept is None else dealt.masked_fill(~kept, 0)
