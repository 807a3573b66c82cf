# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Adds classes to a head that has trained, in one process or split over many.

The head's parameters grow, and so does the state that an optimizer keeps for them.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import arguments, validation
from ..generators import rank_generator
from .replacing import Head, check, described, optimizer_of, parameters, replace
from .shard import (
    ClassShard,
    check_whole,
    chunk,
    local,
    raising_together,
    require_agreement,
    sharded,
)


class Grown(NamedTuple):
    """Holds a tensor with k more rows, and says which of the new rows this process holds."""

    tensor: Tensor  # (C + k, ...), a DTensor if the old one was
    fresh: Tensor  # view of the new rows held here, zeros
    which: slice  # their places among the k new rows


@torch.no_grad()
def extend(
    head: Head, k: int, init: Tensor | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Adds k classes to a head; see :meth:`marginkernels.MarginSoftmaxHead.extend`."""
    shard = head.shard
    group = None if shard is None else shard.group
    with raising_together(group):
        optimizer = optimizer_of(head, optimizer)
        _check(head, k, init, optimizer)
    if group is not None:
        given = dict(k=k, init=init is not None)
        require_agreement(group, **given, **described(head, optimizer))
    for name in parameters(head):
        rows = k * head.sub_centers if name == "weight" else k
        grown = _grow(getattr(head, name), rows, shard)
        if name == "weight":
            _fill(grown, init, shard)

        def grow(key: str, value: Any, group: dict[str, Any], rows: int = rows) -> Tensor:
            grown = _grow(value, rows, shard)
            grown.fresh.fill_(_first_value(key, group))
            return grown.tensor

        replace(head, name, grown.tensor, optimizer, grow)
    head.num_classes += k
    if shard is not None:
        world, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
        start, stop = chunk(head.num_classes, world, rank)
        head.shard = dataclasses.replace(shard, start=start, stop=stop, total=head.num_classes)


def _check(
    head: Head, k: int, init: Tensor | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raises ValueError or TypeError, before anything is changed."""
    arguments.integer("k", k)
    if init is not None:
        validation.check_tensor("init", init, shape=(k * head.sub_centers, head.embedding_size))
    check(head, optimizer)
    validation.check_margin(head.margin, head.num_classes + k)
    validation.check_class_weight(head.class_weight, head.num_classes + k, 0.0)
    if head.shard is not None:
        ranks = dist.get_world_size(head.shard.group)
        check_whole("num_classes + k", head.num_classes + k, head.sub_centers, ranks)


def _fill(grown: Grown, init: Tensor | None, shard: ClassShard | None) -> None:
    """Fills the new rows held here from ``init``, or at random."""
    if init is not None:
        grown.fresh.copy_(init[grown.which])
        return
    generator = None
    if shard is not None:
        generator = rank_generator(grown.fresh.device, dist.get_rank(shard.group))
    grown.fresh.normal_(std=0.01, generator=generator)


def _first_value(key: str, settings: dict[str, Any]) -> float:
    """Returns the value that a state has before the first step."""
    if key == "step_size" and "etas" in settings:  # Rprop
        return settings["lr"]
    if key == "sum":  # Adagrad
        return settings.get("initial_accumulator_value", 0.0)
    return 0.0


def _grow(old: Any, k: int, shard: ClassShard | None) -> Grown:
    """Returns the tensor or DTensor with k more rows, split over the ranks as DTensor splits."""
    total = old.shape[0]
    if shard is None:
        tensor = old.new_zeros(total + k, *old.shape[1:])
        tensor[:total] = old
        return Grown(tensor, tensor[total:], slice(0, k))
    rank, world = dist.get_rank(shard.group), dist.get_world_size(shard.group)
    before = [chunk(total, world, r) for r in range(world)]
    after = [chunk(total + k, world, r) for r in range(world)]
    start, stop = after[rank]
    held = local(old)
    rows = held.new_zeros(stop - start, *held.shape[1:])
    kept = max(0, min(stop, total) - start)
    # classes stay in order, so that each rank sends, and receives, one run of rows per other rank
    dist.all_to_all_single(
        rows[:kept],
        held.contiguous(),
        [_overlap(after[rank], part) for part in before],
        [_overlap(before[rank], part) for part in after],
        group=shard.group,
    )
    tensor = sharded(rows, old.device_mesh, (total + k, *old.shape[1:]))
    return Grown(tensor, rows[kept:], slice(start + kept - total, stop - total))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    """Returns how many classes two parts share."""
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
