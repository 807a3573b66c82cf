# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Cleans data by a head with sub-centres (Deng et al., Sub-center ArcFace, ECCV 2020).

Of each class one centre gathers most rows, and the others those with wrong labels. Counting tells
which is which, and how far each row is from the centres of its class.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, centers, evaluation, ops
from .batch import held
from .distributed import replacing
from .distributed.base import Exchange
from .distributed.exchange import opened
from .distributed.shard import local, raising_together, require_agreement, sharded
from .norms import unit_rows

if TYPE_CHECKING:
    from .modules import MarginSoftmaxHead


class Counted(NamedTuple):
    """Holds what was counted of M rows of this rank, and of C classes of K centres."""

    dominant: Tensor  # (C,) the centre with most rows; of equals, and of none, the first
    label: Tensor  # (M,) the class of a row, or -1
    cosines: Tensor  # (M, K) of the row and the centres of its class
    place: tuple[int, ...]  # of the weight, see _place


@torch.no_grad()
def center_counts(
    head: "MarginSoftmaxHead",
    source: Tensor | Iterable[tuple[Tensor, Tensor]],
    labels: Tensor | None,
) -> Tensor:
    """See :meth:`marginkernels.MarginSoftmaxHead.center_counts`."""
    with raising_together(None if head.shard is None else head.shard.group):
        k = _several(head)
        batches = _batches(source, labels)
    w = head.held_weight()
    w = w if len(w) else F.pad(w, (0, 0, 0, k))  # a rank without classes
    counts = torch.zeros(len(w) // k, k, dtype=torch.int64, device=w.device)
    label, cosines = [counts.new_empty(0)], [w.new_empty(0, k, dtype=_dtype(head))]
    while (found := _gathered(head, batches)) is not None:
        exchange, x, y = found
        of_centers = exchange.total(_counted(head, x, y, exchange.first_class, w, counts))
        label.append(held(exchange.own(y), 0, head.num_classes, head.settings.ignore_index))
        cosines.append(exchange.own(of_centers))
    if head.shard is not None and head._mesh is not None:
        part: Any = sharded(counts[: head.shard.size], head._mesh, (head.num_classes, k))
        counts = part.full_tensor()
    head._counted = Counted(counts.argmax(1), torch.cat(label), torch.cat(cosines), _place(head))
    return counts


def _gathered(
    head: "MarginSoftmaxHead", batches: Iterator[Any]
) -> tuple[Exchange, Tensor, Tensor] | None:
    """Returns the next batch of all ranks, (N, D) and (N,), or None where no rank has one.

    A rank that has no other gives no rows.
    """
    w, shard = head.held_weight(), head.shard
    if shard is not None:  # the ranks' batches need not be even here
        shard = dataclasses.replace(shard, even_batches=False, max_local_batch=None)
    x, y = w.new_empty(0, w.shape[1], dtype=_dtype(head)), w.new_empty(0, dtype=torch.int64)
    error = None
    try:
        batch = next(batches, None)
        if batch is not None:
            x, y = _checked(head, batch)
    except Exception as raised:
        error = raised

    def check() -> None:
        if error is not None:
            raise error

    exchange, _ = opened(shard, x, w, check, lambda _: {})
    x, y = exchange.features(x), exchange.rows(y, fill=head.settings.ignore_index)
    return (exchange, x, y) if len(x) else None


def _counted(
    head: "MarginSoftmaxHead", x: Tensor, y: Tensor, first: int, w: Tensor, counts: Tensor
) -> Tensor:
    """Adds rows (N, D) with classes (N,) to the counts of this rank's classes.

    Returns:
        The cosines (N, K) of rows and the centres of their class, 0 where that is not here.
    """
    k, dtype = head.sub_centers, _dtype(head)
    count = head.num_classes if head.shard is None else head.shard.size
    place = held(y, first, count, head.settings.ignore_index)
    here = place >= 0
    cosines = centers.products(unit_rows(x, dtype), w, place, k, True, dtype)
    nearest = torch.where(here, place * k + cosines.argmax(1), 0)
    counts.view(-1).index_add_(0, nearest, here.to(counts.dtype))
    return torch.where(here[:, None], cosines, 0)


@torch.no_grad()
def drop_sub_centers(
    head: "MarginSoftmaxHead", keep: str, angle: float, optimizer: torch.optim.Optimizer | None
) -> Tensor:
    """See :meth:`marginkernels.MarginSoftmaxHead.drop_sub_centers`."""
    shard, k = head.shard, head.sub_centers
    group = None if shard is None else shard.group
    with raising_together(group):
        counted = _counted_of(head, keep, angle)
        optimizer = replacing.optimizer_of(head, optimizer)
        replacing.check(head, optimizer)
    if group is not None:
        require_agreement(group, angle=angle, **replacing.described(head, optimizer))
    held_here = counted.dominant if shard is None else counted.dominant[shard.rows(1)]
    rows = torch.arange(len(held_here), device=held_here.device) * k + held_here

    def kept(key: str, value: Any, settings: dict[str, Any]) -> Tensor:
        part = local(value)[rows]
        if shard is None:
            return part
        return sharded(part, value.device_mesh, (head.num_classes, *value.shape[1:]))

    replacing.replace(head, "weight", kept("weight", head.weight.detach(), {}), optimizer, kept)
    head.settings, head._counted = head.settings._replace(sub_centers=1), None
    _, label, cosines, _ = counted
    of_dominant = cosines.gather(1, counted.dominant[label.clamp_min(0)][:, None])[:, 0]
    return (label >= 0) & (of_dominant.clamp(-1, 1) >= math.cos(angle))


def _several(head: "MarginSoftmaxHead") -> int:
    """Returns the number of centres of each class, or raises ValueError for one."""
    if head.sub_centers == 1:
        raise ValueError("sub_centers: expected a head with several for each class, got 1")
    return head.sub_centers


def _dtype(head: "MarginSoftmaxHead") -> torch.dtype:
    return ops.statistics_dtype(head.weight.dtype)


def _batches(source: Any, labels: Tensor | None) -> Iterator[Any]:
    """Returns an iterator over batches that are not empty."""
    if isinstance(source, Tensor):
        source = [(source, labels)]
    elif labels is not None or not isinstance(source, Iterable):
        raise TypeError(
            "source: expected embeddings with labels, or an iterable of batches of both, got "
            + type(source).__name__
            + (" with labels" if labels is not None else "")
        )
    return (batch for batch in source if not (_is_pair(batch) and batch[0].numel() == 0))


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)


def _checked(head: "MarginSoftmaxHead", batch: Any) -> tuple[Tensor, Tensor]:
    """Returns embeddings (n, D), in the type that is computed in, and labels (n,).

    Raises:
        TypeError, ValueError: they are something else.
    """
    if not _is_pair(batch):
        raise TypeError(
            f"source: expected batches (embeddings, labels), got {type(batch).__name__}"
        )
    x, y = batch
    evaluation.check_embeddings(head.weight, x)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        came = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels: expected int64 ({len(x)},), one for each row, got {came}")
    y = ops.checked_labels(y, head.num_classes, head.settings.ignore_index, "labels")
    return x.to(_dtype(head)), y.to(x.device)


def _counted_of(head: "MarginSoftmaxHead", keep: str, angle: float) -> Counted:
    """Returns what was counted, or raises what forbids to drop centres."""
    _several(head)
    if keep != "dominant":
        raise ValueError(f"keep: expected 'dominant', got {keep!r}")
    arguments.number("angle", angle, above=0, most=math.pi)
    if head._counted is None or head._counted.place != _place(head):
        found = "none" if head._counted is None else "those of a weight that has changed since"
        raise RuntimeError(f"center_counts: expected counts of the weight as it is, got {found}")
    return head._counted


def _place(head: "MarginSoftmaxHead") -> tuple[int, ...]:
    """Returns address and versions of the weight, one of which changes with each write."""
    w = local(head.weight.detach())
    # an optimizer of torch.optim writes to the DTensor, one of marginkernels.optim to its rows
    return w.data_ptr(), w._version, head.weight._version
