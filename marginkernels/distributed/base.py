# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines what one call asks of the ranks: :class:`Exchange`, and a process that has all itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import device_checks
from ..results import SweepResult

T = TypeVar("T")


class Exchange(ABC):
    """Brings together what one call needs from all ranks.

    A loss calls these methods in this order, with :meth:`candidates` for ``topk`` alone. All ranks
    make, and use, an exchange in the same order. This rank has n rows, and all ranks together have
    N. :class:`Whole` serves a single process,
    :class:`~marginkernels.distributed.exchange.Sharded` a rank of a group.
    """

    is_split: bool  # whether other ranks hold classes and rows too
    first_class: int  # that this rank holds
    check_w: str  # what becomes of a w out of range: "raise" an error, "mark" lse by NaN, or ""
    wants_stats: bool  # whether any rank wants statistics

    @abstractmethod
    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        """Returns x (N, D) of all ranks.

        Backward sums the ranks' dx and keeps this rank's rows, times the number of ranks where
        ``grad_scale`` is "ddp".

        Args:
            x: (n, D).
            sent_as: a type that holds the numbers of x too; dx is exchanged in x's type.
        """

    @abstractmethod
    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        """Returns the numbers (N,) of all ranks' rows from this rank's (n,).

        Backward keeps this rank's rows. ``fill`` is the number of a row that is padding.
        """

    @abstractmethod
    def own(self, values: Tensor) -> Tensor:
        """Returns this rank's rows (n, ...) of numbers (N, ...), without gradient."""

    @abstractmethod
    def of_own_rows(
        self, own: Tensor, function: Callable[..., Tensor], every: Tensor, *args: Any
    ) -> Tensor:
        """Evaluates ``function`` on the rows of all ranks, but differentiates it through this
        rank's rows only.

        Args:
            own: (n,), ``function`` of this rank's rows, with its gradient.
            function: maps rows (N, D) and ``args`` to numbers (N,).
            every: (N, D), the rows of all ranks.
        """

    @abstractmethod
    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        """Returns ``function(*args)``.

        Where values are checked on several ranks, it returns None for a function that raises, and
        :meth:`merge` raises the error on all ranks.
        """

    @abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over the ranks, without gradient."""

    @abstractmethod
    def scale(self, scale: Tensor, learns: bool) -> Tensor:
        """Returns the scale for the sweep; backward sums the gradients from the ranks' classes.

        ``learns`` says whether the scale may be trained on any rank.
        """

    @abstractmethod
    def merge(
        self, position: Tensor, result: SweepResult, one_versus_rest: bool = False
    ) -> SweepResult:
        """Returns the ranks' sweep results as one sweep over all classes would give them.

        Args:
            position: (N,), the place of the row's class among the swept, -1 where it is not there.
            result: of the sweep over this rank's classes.
            one_versus_rest: whether its lse is a sum of softplus.
        """

    @abstractmethod
    def greatest(self, values: Tensor) -> Tensor:
        """Returns the k greatest values of all ranks for each row, (N, k), the greatest first.

        Args:
            values: (N, k), those of this rank, the greatest first.
        """

    @abstractmethod
    def candidates(self, k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for this rank's rows the greatest values of all ranks and their classes.

        Args:
            k: the number of values that each rank gives at most.
            values: (N, at most k), the greatest among this rank's classes.
            classes: their classes.

        Returns:
            Two tensors (n, W k).
        """


class Whole(Exchange):
    """Holds all classes and rows in this process, and exchanges nothing."""

    is_split, first_class = False, 0

    def __init__(self, x: Tensor, wants_stats: bool = False):
        self.check_w = "raise" if device_checks.checks_values(x.device) else ""
        self.wants_stats = wants_stats

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        return x

    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        return values

    def own(self, values: Tensor) -> Tensor:
        return values

    def of_own_rows(
        self, own: Tensor, function: Callable[..., Tensor], every: Tensor, *args: Any
    ) -> Tensor:
        return own

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        return function(*args)

    def total(self, values: Tensor) -> Tensor:
        return values

    def scale(self, scale: Tensor, learns: bool) -> Tensor:
        return scale

    def merge(
        self, position: Tensor, result: SweepResult, one_versus_rest: bool = False
    ) -> SweepResult:
        return result

    def greatest(self, values: Tensor) -> Tensor:
        return values

    def candidates(self, k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        return values, classes
