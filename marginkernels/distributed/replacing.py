# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Replaces parameters of a head by ones with other rows, and takes an optimizer along."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import arguments
from ..settings import Settings
from ..update import Update
from .shard import ClassShard

# states of torch's optimizers that have neither a row for each class nor one number
_OF_ALL_CLASSES = ("col_var",)  # Adafactor


class Head(Protocol):
    """Names the attributes of a head that change with the rows of its parameters."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    margin: nn.Module
    class_weight: Tensor | None
    embedding_size: int
    num_classes: int
    settings: Settings
    shard: ClassShard | None
    _mesh: DeviceMesh | None
    _update: Update | None
    _parameters: dict[str, nn.Parameter | None]

    @property
    def sub_centers(self) -> int:
        """Returns the number of rows of the weight that each class has."""


def parameters(head: Head) -> list[str]:
    """Returns the names of the parameters with rows of classes."""
    return [name for name in ("weight", "bias") if getattr(head, name) is not None]


def optimizer_of(
    head: Head, optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer | None:
    """Returns the optimizer that moves the head's weights in backward, or the given one.

    Raises:
        ValueError: the head has one, and another is given.
        RuntimeError: a step is under way.
    """
    update = head._update
    if update is None:
        return optimizer
    if optimizer not in (None, update.optimizer):
        raise ValueError(
            f"optimizer: expected None or the head's own, {type(update.optimizer).__name__} of "
            f"marginkernels.optim, got {type(optimizer).__name__}"
        )
    update.require_between_steps()
    return update.optimizer


def check(head: Head, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError or TypeError for parameters or a state that cannot be replaced."""
    # gathered for its forward, a weight that fully_shard manages looks like any other
    if any(base.__name__ == "FSDPModule" for base in type(head).__mro__):
        raise ValueError("weight: expected it as the head made it, got one given to fully_shard")
    for name in parameters(head):
        _check_parameter(head, name)
    if optimizer is not None:
        _check_optimizer(head, optimizer)


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
    """Raises ValueError or TypeError for an optimizer whose state cannot follow."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: expected one with a state for each parameter, got LBFGS")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name in parameters(head):
        parameter = getattr(head, name)
        if id(parameter) not in held:
            raise ValueError(f"optimizer: expected one that holds the head's {name}")
        for key, value in optimizer.state.get(parameter, {}).items():
            known = _is_per_row(key, value, parameter) or key in _OF_ALL_CLASSES
            if not known and (
                isinstance(value, dict | list | tuple)
                or (isinstance(value, Tensor) and value.numel() != 1)
            ):
                raise ValueError(
                    f"optimizer: expected state with a row for each class, got {key} "
                    f"{tuple(getattr(value, 'shape', ()))} of {type(optimizer).__name__}"
                )


def _is_per_row(key: str, value: Any, parameter: Tensor) -> bool:
    """Returns whether a part of an optimizer's state has a row for each row of the parameter."""
    return (
        isinstance(value, Tensor)
        and key not in _OF_ALL_CLASSES
        and value.shape[:1] == parameter.shape[:1]
        and value.ndim == parameter.ndim
        and arguments.is_dtensor(value) == arguments.is_dtensor(parameter)
    )


def described(head: Head, optimizer: torch.optim.Optimizer | None) -> dict[str, object]:
    """Returns what ranks have to agree on: the optimizer, and the keys of its states."""
    names = {"optimizer": type(optimizer).__name__}
    if optimizer is None:
        return {**names}
    return names | {
        f"optimizer.state[{name}]": sorted(optimizer.state.get(getattr(head, name), {}))
        for name in parameters(head)
    }


def replace(
    head: Head,
    name: str,
    tensor: Tensor,
    optimizer: torch.optim.Optimizer | None,
    convert: Callable[[str, Tensor, dict[str, Any]], Tensor],
) -> None:
    """Gives a head another parameter, without a gradient, and its optimizer the state for that.

    Args:
        tensor: what the parameter is to be.
        convert: maps the key of a state with a row for each row of the old parameter, that state,
            and the settings of the optimizer to the state of the new parameter.
    """
    old = getattr(head, name)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(head, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        if any(p is old for p in group["params"]):
            group["params"] = [new if p is old else p for p in group["params"]]
            settings = group
    state = optimizer.state.pop(old, {})
    for key, value in state.items():
        if _is_per_row(key, value, old):
            state[key] = convert(key, value, settings)
    if state:
        optimizer.state[new] = state
