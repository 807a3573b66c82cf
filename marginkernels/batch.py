# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the rows of one call, and computes what is asked about them."""

import torch
from torch import Tensor

from . import row_ops
from .call import Call
from .distributed.exchange import Exchange
from .margins import Rows
from .norms import row_norm


class Batch:
    """Holds the N rows of all ranks, as every rank sees them.

    Args:
        exchange: gathers the rows of all ranks.
        call: the checked call.
        noise: the numbers that the margin has drawn for this rank's rows, or None.
    """

    x: Tensor  # (N, D)
    label: Tensor  # (N,) as given
    local_class: Tensor  # (N,) the class as a row of this rank's w; -1 where w does not hold it
    sample_weight: Tensor | None  # (N,)

    def __init__(self, exchange: Exchange, call: Call, noise: Tensor | None):
        self._exchange, self._call = exchange, call
        self._has_gradients = torch.is_grad_enabled()
        ignored = call.settings.ignore_index
        self.x = exchange.features(call.x, sent_as=call.x_dtype)
        self.label = exchange.rows(call.label, fill=ignored)
        self.sample_weight, self._row_margin, self._noise = (
            None if given is None else exchange.rows(given)
            for given in (call.sample_weight, call.row_margin, noise)
        )
        first, count = exchange.first_class, call.w.shape[0]
        if call.fuses_rows:
            self.local_class = row_ops.head_held(call.backend)(
                self.label, first=first, count=count, ignore_index=ignored
            )
        else:
            self.local_class = held(self.label, first, count, ignored)
        self._kept: Tensor | None = None
        self._class: Tensor | None = None
        self._x_norm: Tensor | None = None

    def labelled(self) -> Tensor:
        """Says whether a row's label is not ``ignore_index``, (N,) bool."""
        return self.label != self._call.settings.ignore_index

    def kept(self) -> Tensor:
        """Says whether a row's label is that of a class and not ``ignore_index``, (N,) bool."""
        if self._kept is None:
            call = self._call
            self._kept = in_range(self.label, 0, call.num_classes, call.settings.ignore_index)
        return self._kept

    def x_norm(self) -> Tensor:
        """Returns |x_i| of the rows as rounded, (N,); the gradient goes to this rank's rows."""
        if self._x_norm is None:
            dtype = self._call.compute_dtype
            # `negatives`, which may ask first, runs without gradients
            with torch.set_grad_enabled(self._has_gradients):
                own = row_norm(self._call.x, dtype)
                self._x_norm = self._exchange.of_own_rows(own, row_norm, self.x, dtype)
        return self._x_norm

    def rows(self, w_norm: Tensor | None, scale: Tensor) -> Rows:
        """Returns what a margin may look at."""
        if self._class is None:
            self._class = torch.where(self.kept(), self.label, 0)
        return Rows(
            self._class, self.x_norm, w_norm, self._row_margin, self._kept, self._noise, scale
        )


def in_range(label: Tensor, first: int, stop: int, ignore_index: int) -> Tensor:
    """Says whether a label is in [first, stop) and not ``ignore_index``, (N,) bool."""
    inside = (label >= first) & (label < stop)
    return inside & (label != ignore_index) if first <= ignore_index < stop else inside


def held(label: Tensor, first: int, count: int, ignore_index: int) -> Tensor:
    """Returns the place of each label among ``count`` classes from ``first`` on, (N,), or -1."""
    here = in_range(label, first, first + count, ignore_index)
    return torch.where(here, label - first if first else label, -1)
