# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Counts wavefronts of accesses to shared memory, which has 32 banks of 4 bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiling import State
from ..ptx_types import Array, i64

BANKS = 32
LANES_PER_PHASE = {8: 16, 16: 8}  # access size -> lanes that are served together, else all
KEPT = 512


class BankModel:
    """Counts wavefronts, and remembers the counts of patterns that it has seen."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, int]] = {}

    def wavefronts(
        self, state: State, a: Array, lanes: Array | None, size: int, per: int | None = None
    ) -> tuple[int, int]:
        """Returns wavefronts and their conflict-free minimum for one access by a batch of warps.

        `per` is the number of lanes that are served together, where the size does not say it.
        """
        n = state.n_cta
        if n > 1 and len(a) and len(a) % n == 0 and (a.reshape(n, -1) == a[: len(a) // n]).all():
            # CTAs doing the same thing: count one of them
            one = None if lanes is None else self._lanes_of_each(state, lanes)
            if lanes is None or one is not None:
                actual, ideal = self._count(a[: len(a) // n], one, size, per)
                return actual * n, ideal * n
        return self._count(a, lanes, size, per)

    @staticmethod
    def _lanes_of_each(state: State, lanes: Array) -> Array | None:
        """Returns the lanes of the first CTA if those of all CTAs are the same."""
        table = lanes.reshape(state.n_cta, -1)
        first = table[0]
        same = (table % state.cta_lanes == first).all()
        own = (table // state.cta_lanes == np.arange(state.n_cta)[:, None]).all()
        return first if same and own else None

    def _count(self, a: Array, lanes: Array | None, size: int, per: int | None) -> tuple[int, int]:
        key = (size, a.tobytes(), None if lanes is None else lanes.tobytes(), per)
        if key in self._known:
            return self._known[key]
        per = per or LANES_PER_PHASE.get(size, 32)
        phase = (np.arange(len(a)) if lanes is None else lanes) // per
        n = max(1, size // 4)
        words = (a.astype(i64) >> 2)[:, None] + np.arange(n)
        distinct = np.unique(np.repeat(phase, n) * (1 << 32) + words.reshape(-1))
        phases, row = np.unique(distinct >> 32, return_inverse=True)
        bank = (distinct & 0xFFFFFFFF) % BANKS
        table = np.bincount(row * BANKS + bank, minlength=len(phases) * BANKS)
        counts = int(table.reshape(-1, BANKS).max(1).sum()), len(phases)
        if len(self._known) > KEPT:
            self._known.clear()
        self._known[key] = counts
        return counts
