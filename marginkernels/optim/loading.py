# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks a state dict of an optimizer, its own or one of torch.optim's, before it is loaded."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..arguments import is_dtensor
from ..distributed.shard import ClassShard

State = dict[str, Any]

# the entries of a parameter group that name its parameters, and are never loaded
OF_PARAMETERS = {"params", "param_names"}
# the settings of torch.optim that say how an optimizer computes, and not what
MEANS = {"foreach", "fused", "capturable", "differentiable"}
# those that would change a step here, with what they have to be
_REQUIRED = {"maximize": False, "amsgrad": False, "decoupled_weight_decay": True}
# settings here that those of torch.optim lack
_OF_HEAD = {"project", "clip_row_norm", "seed"}


def settings(optimizer: torch.optim.Optimizer, state_dict: State) -> dict[str, Any]:
    """Returns the settings of the group that a state dict has.

    Raises:
        ValueError: it has other groups, lacks settings, or has some that change the steps of torch.
    """
    groups = state_dict["param_groups"]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    got = [len(group["params"]) for group in groups]
    if expected != got:
        raise ValueError(
            "state_dict: expected one group with the weight of the head, and with its bias where "
            f"it has one, {expected[0]} in all, got groups of {got}"
        )
    loaded = {k: copy.deepcopy(v) for k, v in groups[0].items() if k not in OF_PARAMETERS | MEANS}
    lacking = sorted(optimizer.defaults.keys() - _OF_HEAD - loaded.keys())
    if lacking:
        raise ValueError(
            f"state_dict: expected that of {type(optimizer).__name__}, got one without "
            + ", ".join(lacking)
        )
    for name, required in _REQUIRED.items():
        if loaded.pop(name, required) != required:
            raise ValueError(f"state_dict: expected {name}={required}, got {not required}")
    return loaded


def values(kind: str, states: dict[Tensor, State], state_dict: State) -> list[tuple[Tensor, Any]]:
    """Returns each tensor of the states with the value that it is to have.

    Args:
        kind: the name of the optimizer.
        states: of its parameters, in their order.

    Raises:
        ValueError: the state has other parts, or another shape.
    """
    pairs = []
    numbers = state_dict["param_groups"][0]["params"]
    for number, own in zip(numbers, states.values(), strict=True):
        given = state_dict["state"].get(number, {})
        loaded = {name: value for name, value in given.items() if value is not None}
        if not loaded.keys() - {"step"}:  # torch's before the first step, or without a state
            zeros = {name: torch.zeros_like(own[name]) for name in own if name != "step"}
            loaded = zeros | {"step": loaded.get("step", 0)}
        # torch's SGD does not count; what counts here is whether a step is the first
        loaded.setdefault("step", 1)
        for name in own.keys() | loaded.keys():
            shapes = [tuple(torch.as_tensor(s[name]).shape) for s in (own, loaded) if name in s]
            if len(shapes) < 2 or shapes[0] != shapes[1]:
                raise ValueError(
                    f"state_dict: expected the state of {kind}, {_parts(own)}, got {_parts(loaded)}"
                )
            pairs.append((own[name], loaded[name]))
    return pairs


def _parts(state: State) -> str:
    shapes = {name: tuple(torch.as_tensor(value).shape) for name, value in sorted(state.items())}
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def held(value: Any, own: Tensor, shard: ClassShard | None) -> Tensor:
    """Returns the rows of a value that ``own`` has on this rank."""
    if is_dtensor(value):
        layouts = [(getattr(t, "device_mesh", None), getattr(t, "placements", None))
                   for t in (own, value)]  # fmt: skip
        if layouts[0] == layouts[1]:
            return value.to_local()
        value = value.full_tensor()
    value = torch.as_tensor(value)
    if not is_dtensor(own) or shard is None:
        return value
    return value[shard.rows(len(own) // shard.total)]
