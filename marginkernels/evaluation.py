# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes logits without margin, for evaluation: block after block of classes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments, ops, validation
from .call import resolve_compute_dtype
from .distributed.exchange import opened
from .distributed.shard import ClassShard
from .greatest import CHUNK, greatest
from .norms import unit_rows

if TYPE_CHECKING:
    from .modules import MarginSoftmaxHead


class Classes(NamedTuple):
    """Holds what the logits of embeddings are made with."""

    weight: Tensor  # (C K, D), the rows of this rank
    num_classes: int  # of all ranks
    bias: Tensor | None = None  # (C,)
    scale: float | Tensor = 1.0
    normalize: str = "both"
    compute_dtype: torch.dtype | None = None
    sub_centers: int = 1
    shard: ClassShard | None = None


def classes_of(head: "MarginSoftmaxHead") -> Classes:
    """Returns the classes that a head holds."""
    return Classes(
        head.held_weight(), head.num_classes, head.held_bias(),
        head.scale() if isinstance(head.scale, nn.Module) else head.scale,
        head.settings.normalize, head.settings.compute_dtype, head.sub_centers, head.shard,
    )  # fmt: skip


def logits(classes: Classes, embeddings: Tensor) -> Tensor:
    """See :meth:`marginkernels.MarginSoftmaxHead.logits`."""
    if classes.shard is not None:
        raise RuntimeError(
            "logits: the classes are split over ranks: topk merges them, and "
            "full_state_dict() loads into a head that has them all"
        )
    check_embeddings(classes.weight, embeddings)
    return torch.cat([block for _, block in _blocks(classes, embeddings)], dim=1)


@torch.no_grad()
def topk(classes: Classes, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :meth:`marginkernels.MarginSoftmaxHead.topk`."""

    def check() -> torch.dtype:
        arguments.integer("k", k, most=classes.num_classes)
        check_embeddings(classes.weight, embeddings)
        return _compute_dtype(classes, embeddings)

    exchange, compute_dtype = opened(
        classes.shard,
        embeddings,
        classes.weight,
        check,
        lambda compute_dtype: dict(k=k, compute_dtype=compute_dtype),
    )
    rows = exchange.features(embeddings)
    values = rows.new_empty(len(rows), 0, dtype=ops.statistics_dtype(compute_dtype))
    places = values.long()
    for start, block in _blocks(classes, rows):
        best, where = greatest(block, k)
        values = torch.cat([values, best], dim=1)
        places = torch.cat([places, where + start], dim=1)
        values, places = _greatest(k, values, places)
    return _greatest(k, *exchange.candidates(k, values, places))


def check_embeddings(weight: Tensor, embeddings: Tensor) -> None:
    """Raises TypeError or ValueError for embeddings that are not (N, D) on the weight's device."""
    validation.check_tensor("embeddings", embeddings, like=weight)
    if embeddings.ndim != 2 or embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings: expected (N, {weight.shape[1]}), got {tuple(embeddings.shape)}"
        )


def _compute_dtype(classes: Classes, embeddings: Tensor) -> torch.dtype:
    return resolve_compute_dtype(embeddings, classes.weight, classes.compute_dtype)


def _blocks(classes: Classes, embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields the first class and the logits of each block, in the statistics dtype."""
    weight, bias, k = classes.weight, classes.bias, classes.sub_centers
    compute_dtype = _compute_dtype(classes, embeddings)
    x = classes.scale * _operand(embeddings, classes.normalize == "both", compute_dtype)
    first = 0 if classes.shard is None else classes.shard.start
    count = max(1, CHUNK // k)
    for start in range(0, len(weight) // k, count):
        rows = weight[start * k : (start + count) * k]
        w = _operand(rows, classes.normalize != "none", compute_dtype)
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


def _greatest(k: int, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the k greatest values (N, M), at most M, in each row, and their classes."""
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return values, places.gather(1, order)
