# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Adds classes to a head that has trained, in one process or split over many.

The head's parameters grow, and so does the state that an optimizer keeps for them.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import arguments, validation
from ..generators import rank_generator
from ..update import Update
from .shard import (
    ClassShard,
    check_whole,
    chunk,
    local,
    raising_together,
    require_agreement,
    sharded,
)

# states of torch's optimizers that have neither a row for each class nor one number
_OF_ALL_CLASSES = ("col_var",)  # Adafactor


class Head(Protocol):
    """Names the attributes of a head that :func:`extend` reads or changes."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    margin: nn.Module
    class_weight: Tensor | None
    embedding_size: int
    num_classes: int
    shard: ClassShard | None
    _mesh: DeviceMesh | None
    _update: Update | None
    _parameters: dict[str, nn.Parameter | None]

    @property
    def sub_centers(self) -> int:
        """Returns the number of rows of the weight that each class has."""


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
    update = head._update
    with raising_together(group):
        if update is not None:
            optimizer = _own_optimizer(update, optimizer)
        _check(head, k, init, optimizer)
    if group is not None:
        given = dict(k=k, init=init is not None, optimizer=type(optimizer).__name__)
        require_agreement(group, **given, **_states(head, optimizer))
    for name in _parameters(head):
        old = getattr(head, name)
        rows = k * head.sub_centers if name == "weight" else k
        grown = _grow(old, rows, shard)
        if name == "weight":
            _fill(grown, init, shard)
        new = nn.Parameter(grown.tensor, requires_grad=old.requires_grad)
        setattr(head, name, new)
        if optimizer is not None:
            _replace(optimizer, old, new, rows, shard)
    head.num_classes += k
    if shard is not None:
        world, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
        start, stop = chunk(head.num_classes, world, rank)
        head.shard = dataclasses.replace(shard, start=start, stop=stop, total=head.num_classes)


def _own_optimizer(
    update: Update, optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer:
    """Returns the optimizer that moves the head's weights in backward.

    Raises:
        ValueError: another is given.
        RuntimeError: a step is under way.
    """
    if optimizer not in (None, update.optimizer):
        raise ValueError(
            f"optimizer: expected None or the head's own, {type(update.optimizer).__name__} of "
            f"marginkernels.optim, got {type(optimizer).__name__}"
        )
    update.require_between_steps()
    return update.optimizer


def _check(
    head: Head, k: int, init: Tensor | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raises ValueError or TypeError, before anything is changed."""
    arguments.integer("k", k)
    if init is not None:
        validation.check_tensor("init", init, shape=(k * head.sub_centers, head.embedding_size))
    # gathered for its forward, a weight that fully_shard manages looks like any other
    if any(base.__name__ == "FSDPModule" for base in type(head).__mro__):
        raise ValueError("weight: expected it as the head made it, got one given to fully_shard")
    for name in _parameters(head):
        _check_parameter(head, name)
    if optimizer is not None:
        _check_optimizer(head, optimizer)
    validation.check_margin(head.margin, head.num_classes + k)
    validation.check_class_weight(head.class_weight, head.num_classes + k, 0.0)
    if head.shard is not None:
        ranks = dist.get_world_size(head.shard.group)
        check_whole("num_classes + k", head.num_classes + k, head.sub_centers, ranks)


def _check_parameter(head: Head, name: str) -> None:
    """Raises ValueError for a parameter that is not as the head made it."""
    if name not in head._parameters:
        raise ValueError(
            f"{name}: expected a parameter of the head, got one that torch.nn.utils parametrises "
            "or prunes: make that permanent first"
        )
    parameter = getattr(head, name)
    mesh, placements = (getattr(parameter, key, None) for key in ("device_mesh", "placements"))
    if mesh != head._mesh or any(not placement.is_shard(0) for placement in placements or ()):
        raise ValueError(
            f"{name}: expected it as the head made it, got one that something else, such as "
            f"fully_shard, has split: {placements}"
        )


def _check_optimizer(head: Head, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError or TypeError for an optimizer whose state cannot grow."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: expected one with a state for each parameter, got LBFGS")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name in _parameters(head):
        parameter = getattr(head, name)
        if id(parameter) not in held:
            raise ValueError(f"optimizer: expected one that holds the head's {name}")
        for key, value in optimizer.state.get(parameter, {}).items():
            known = _is_per_class(key, value, parameter) or key in _OF_ALL_CLASSES
            if not known and (
                isinstance(value, dict | list | tuple)
                or (isinstance(value, Tensor) and value.numel() != 1)
            ):
                raise ValueError(
                    f"optimizer: expected state with a row for each class, got {key} "
                    f"{tuple(getattr(value, 'shape', ()))} of {type(optimizer).__name__}"
                )


def _is_per_class(key: str, value: Any, parameter: Tensor) -> bool:
    """Returns whether a part of an optimizer's state has a row for each row of the parameter."""
    return (
        isinstance(value, Tensor)
        and key not in _OF_ALL_CLASSES
        and value.shape[:1] == parameter.shape[:1]
        and value.ndim == parameter.ndim
        and arguments.is_dtensor(value) == arguments.is_dtensor(parameter)
    )


def _states(head: Head, optimizer: torch.optim.Optimizer | None) -> dict[str, list[str]]:
    """Lists the keys of the optimizer's state for each parameter."""
    if optimizer is None:
        return {}
    return {
        f"optimizer.state[{name}]": sorted(optimizer.state.get(getattr(head, name), {}))
        for name in _parameters(head)
    }


def _parameters(head: Head) -> list[str]:
    return [name for name in ("weight", "bias") if getattr(head, name) is not None]


def _fill(grown: Grown, init: Tensor | None, shard: ClassShard | None) -> None:
    """Fills the new rows held here from ``init``, or at random."""
    if init is not None:
        grown.fresh.copy_(init[grown.which])
        return
    generator = None
    if shard is not None:
        generator = rank_generator(grown.fresh.device, dist.get_rank(shard.group))
    grown.fresh.normal_(std=0.01, generator=generator)


def _replace(
    optimizer: torch.optim.Optimizer,
    old: Tensor,
    new: Tensor,
    k: int,
    shard: ClassShard | None,
) -> None:
    """Puts the new parameter into the old one's place and gives it the old one's state, grown."""
    for group in optimizer.param_groups:
        if any(p is old for p in group["params"]):
            group["params"] = [new if p is old else p for p in group["params"]]
            settings = group
    state = optimizer.state.pop(old, {})
    for key, value in state.items():
        if _is_per_class(key, value, old):
            grown = _grow(value, k, shard)
            grown.fresh.fill_(_first_value(key, settings))
            state[key] = grown.tensor
    if state:
        optimizer.state[new] = state


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
