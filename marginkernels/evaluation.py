# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes a head's logits without margin, for evaluation: block after block of classes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import arguments, ops, validation
from .call import resolve_compute_dtype
from .distributed.exchange import opened
from .greatest import CHUNK, greatest
from .norms import unit_rows

if TYPE_CHECKING:
    from .modules import MarginSoftmaxHead


def logits(head: "MarginSoftmaxHead", embeddings: Tensor) -> Tensor:
    """See :meth:`marginkernels.MarginSoftmaxHead.logits`."""
    if head.shard is not None:
        raise RuntimeError(
            "logits: the classes are split over ranks: topk merges them, and "
            "full_state_dict() loads into a head that has them all"
        )
    check_embeddings(head, embeddings)
    return torch.cat([block for _, block in _blocks(head, embeddings)], dim=1)


@torch.no_grad()
def topk(head: "MarginSoftmaxHead", embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :meth:`marginkernels.MarginSoftmaxHead.topk`."""

    def check() -> torch.dtype:
        arguments.integer("k", k, most=head.num_classes)
        check_embeddings(head, embeddings)
        return _compute_dtype(head, embeddings)

    exchange, compute_dtype = opened(
        head.shard,
        embeddings,
        head.held_weight(),
        check,
        lambda compute_dtype: dict(k=k, compute_dtype=compute_dtype),
    )
    rows = exchange.features(embeddings)
    values = rows.new_empty(len(rows), 0, dtype=ops.statistics_dtype(compute_dtype))
    classes = values.long()
    for start, block in _blocks(head, rows):
        best, where = greatest(block, k)
        values = torch.cat([values, best], dim=1)
        classes = torch.cat([classes, where + start], dim=1)
        values, classes = _greatest(k, values, classes)
    return _greatest(k, *exchange.candidates(k, values, classes))


def check_embeddings(head: "MarginSoftmaxHead", embeddings: Tensor) -> None:
    """Raises TypeError or ValueError for embeddings that are not (N, D) on the head's device."""
    validation.check_tensor("embeddings", embeddings, like=head.weight)
    if embeddings.ndim != 2 or embeddings.shape[1] != head.embedding_size:
        raise ValueError(
            f"embeddings: expected (N, {head.embedding_size}), got {tuple(embeddings.shape)}"
        )


def _compute_dtype(head: "MarginSoftmaxHead", embeddings: Tensor) -> torch.dtype:
    return resolve_compute_dtype(embeddings, head.weight, head.settings.compute_dtype)


def _blocks(head: "MarginSoftmaxHead", embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the first class and the logits of each block, in the statistics dtype."""
    weight, bias = head.held_weight(), head.held_bias()
    compute_dtype = _compute_dtype(head, embeddings)
    scale = head.scale() if isinstance(head.scale, nn.Module) else head.scale
    x = scale * _operand(embeddings, head.settings.normalize == "both", compute_dtype)
    first = 0 if head.shard is None else head.shard.start
    k = head.sub_centers
    count = max(1, CHUNK // k)
    for start in range(0, len(weight) // k, count):
        rows = weight[start * k : (start + count) * k]
        w = _operand(rows, head.settings.normalize != "none", compute_dtype)
        with torch.autocast(x.device.type, enabled=False):
            block = x @ w.T
        if k > 1:
            block = block.unflatten(1, (-1, k)).max(2).values  # of the nearest centre
        if bias is not None:
            block = block + bias[start : start + count].to(w.dtype)
        yield first + start, block


def _operand(rows: Tensor, normalised: bool, compute_dtype: torch.dtype) -> Tensor:
    """Returns rows as the sweep sees them, in the statistics dtype."""
    return unit_rows(rows, compute_dtype) if normalised else ops.rounded(rows, compute_dtype)


def _greatest(k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the k greatest values (N, M), at most M, in each row, and their classes."""
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return values, classes.gather(1, order)
