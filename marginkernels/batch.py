# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the rows of one call, and computes what is asked about them."""

import torch
from torch import Tensor

from . import row_ops
from .call import Call
from .distributed.base import Exchange
from .margins import Rows
from .norms import row_norm


class Batch:
    """Holds the N rows of all ranks, as every rank sees them.

    Args:
        exchange: gathers the rows of all ranks.
        call: the checked call.
        noise: the numbers that the margin has drawn for this rank's labels, or None.
    """

    x: Tensor  # (N, D)
    label: Tensor  # (N,) or (N, L) as given
    local_class: Tensor  # as label: the class among those of this rank; -1 where it is not there
    sample_weight: Tensor | None  # (N,), with the weight of the row's class
    label_weights: Tensor | None  # (N, L)

    def __init__(self, exchange: Exchange, call: Call, noise: Tensor | None):
        self._exchange, self._call = exchange, call
        self._has_gradients = torch.is_grad_enabled()
        ignored = call.settings.ignore_index
        self.x = exchange.features(call.x, sent_as=call.x_dtype)
        self.label = exchange.rows(call.label, fill=ignored)
        self.sample_weight, self._row_margin, self.label_weights, self._noise = (
            None if given is None else exchange.rows(given)
            for given in (call.sample_weight, call.row_margin, call.label_weights, noise)
        )
        if self.label_weights is not None:
            self.label = torch.where(self.label_weights == 0, ignored, self.label)
        first, count = exchange.first_class, call.w.shape[0] // call.settings.sub_centers
        if call.fuses_rows:
            self.local_class = row_ops.head_held(call.backend)(
                self.label.flatten(), first=first, count=count, ignore_index=ignored
            ).view(self.label.shape)
        else:
            self.local_class = held(self.label, first, count, ignored)
        self._kept: Tensor | None = None
        self._class: Tensor | None = None
        self._x_norm: Tensor | None = None
        if call.class_weight is not None:
            weight = call.class_weight[self._classes()]
            given = self.sample_weight
            self.sample_weight = weight if given is None else weight * given

    @property
    def labels_per_row(self) -> int:
        """Returns L, 1 where labels are (N,)."""
        return self.label.shape[1] if self.label.ndim == 2 else 1

    def labelled(self) -> Tensor:
        """Says whether labels are not ``ignore_index``, bool as they are."""
        return self.label != self._call.settings.ignore_index

    def kept(self) -> Tensor:
        """Says whether labels are those of a class and not ``ignore_index``, bool as they are."""
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

    def pairs(self, w_norm: Tensor, scale: Tensor) -> Rows:
        """Returns what a margin may look at, with N L rows for L labels of each row."""
        return Rows(
            self._classes().flatten(), self._x_norm_of_pairs, w_norm,
            self._of_pairs(self._row_margin), self.kept().flatten(),
            None if self._noise is None else self._noise.flatten(), scale,
        )  # fmt: skip

    def rows(self, scale: Tensor, cosine: Tensor) -> tuple[Rows, Tensor]:
        """Returns what a transform of the negatives may look at, and the targets' cosines (N,).

        Of several labels it is the one with the greatest cosine.

        Args:
            cosine: as the labels, or (0,) where the transform does not look at it.
        """
        label, kept = self._classes(), self.kept()
        if label.ndim == 2:
            known = cosine if cosine.numel() else torch.zeros_like(label, dtype=scale.dtype)
            best = torch.where(kept, known, -torch.inf).argmax(1, keepdim=True)
            label, kept = label.gather(1, best)[:, 0], kept.any(1)
            cosine = known.gather(1, best)[:, 0] if cosine.numel() else cosine
        return Rows(label, self.x_norm, None, self._row_margin, kept, None, scale), cosine

    def over_labels(self, losses: Tensor) -> Tensor:
        """Returns the weighted sums (N,) over the labels of each row; losses are (N L,)."""
        if self.label.ndim == 1:
            return losses
        weight = self.labelled().to(losses.dtype)
        if self.label_weights is None:
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
        else:
            weight = weight * self.label_weights.to(losses.dtype)
        return (losses.view(self.label.shape) * weight).sum(1)

    def has_label(self) -> Tensor:
        """Says whether a row has any label, (N,) bool."""
        labelled = self.labelled()
        return labelled if labelled.ndim == 1 else labelled.any(1)

    def _classes(self) -> Tensor:
        if self._class is None:
            self._class = torch.where(self.kept(), self.label, 0)
        return self._class

    def _x_norm_of_pairs(self) -> Tensor:
        norm = self.x_norm()
        return norm if self.label.ndim == 1 else norm.repeat_interleave(self.labels_per_row)

    def _of_pairs(self, values: Tensor | None) -> Tensor | None:
        """Returns numbers (N,) once for each label, (N L,)."""
        if values is None or self.label.ndim == 1:
            return values
        return values.repeat_interleave(self.labels_per_row)


def in_range(label: Tensor, first: int, stop: int, ignore_index: int) -> Tensor:
    """Says whether a label is in [first, stop) and not ``ignore_index``, (N,) bool."""
    inside = (label >= first) & (label < stop)
    return inside & (label != ignore_index) if first <= ignore_index < stop else inside


def held(label: Tensor, first: int, count: int, ignore_index: int) -> Tensor:
    """Returns the place of each label among ``count`` classes from ``first`` on, (N,), or -1."""
    here = in_range(label, first, first + count, ignore_index)
    return torch.where(here, label - first if first else label, -1)
