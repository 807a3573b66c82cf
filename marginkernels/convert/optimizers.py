# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds the optimizer's state of the class weights in a checkpoint, and makes one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import trees

DROP = "--drop-state leaves out the state of the classes"


@dataclass
class Located:
    """Says where an optimizer's state of a parameter is.

    Attributes:
        path: of the optimizer.
        settings: of the parameter's group, None where it is in none.
        index: the number of the parameter among those of the optimizer.
        state: of the parameter, by name.
    """

    path: trees.Path
    settings: dict[str, Any] | None
    index: Any
    state: dict[str, Any]


def settings_of(groups: list[dict[str, Any]], index: Any) -> dict[str, Any] | None:
    """Returns the settings of the group with a parameter, or None."""
    for group in groups:
        if index in group["params"]:
            return {key: value for key, value in group.items() if key != "params"}
    return None


def optimizers_in(tree: Any, path: trees.Path = ()) -> Iterator[tuple[trees.Path, Any]]:
    """Yields the states of optimizers in a tree, with their paths."""
    if isinstance(tree, Mapping):
        if _is_optimizer(tree):
            yield path, tree
        else:
            for key, value in tree.items():
                yield from optimizers_in(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from optimizers_in(value, (*path, i))


def _is_optimizer(tree: Mapping[Any, Any]) -> bool:
    """Returns whether a dictionary is the state of an optimizer."""
    state, groups = tree.get("state"), tree.get("param_groups")
    return isinstance(state, Mapping) and isinstance(groups, list)


def shapes_of(weight: torch.Size, transposed: bool) -> list[torch.Size]:
    """Returns the shapes that a state of the weight may have: that, or a number for each row."""
    number = [1, weight[1]] if transposed else [weight[0]] + [1] * (len(weight) - 1)
    return [weight, torch.Size(number)]


def by_shape(tree: Any, shapes: list[torch.Size]) -> list[Located]:
    """Finds the states that have one of these shapes."""
    return [
        _located(path, optimizer, index)
        for path, optimizer in optimizers_in(tree)
        for index, state in optimizer["state"].items()
        if any(isinstance(value, Tensor) and value.shape in shapes for value in state.values())
    ]


def last(tree: Any, path: trees.Path, file: Path) -> Located:
    """Finds the state of the last parameter of an optimizer."""
    optimizer = trees.at(tree, path)
    if path not in [found for found, _ in optimizers_in(tree)] or not optimizer["param_groups"]:
        raise ValueError(f"{file}: {trees.named(path)}: expected the state of an optimizer")
    return _located(path, optimizer, optimizer["param_groups"][-1]["params"][-1])


def _located(path: trees.Path, optimizer: Any, index: Any) -> Located:
    groups = [group for group in optimizer["param_groups"] if index in group["params"]]
    if len(groups) != 1:
        raise ValueError(
            f"{trees.named(path)}: expected parameter {index} in one group, got {len(groups)}"
        )
    return Located(path, settings_of(groups, index), index, optimizer["state"].get(index, {}))


def is_per_row(key: str, value: Any, shapes: list[torch.Size], where: str) -> bool:
    """Returns whether a state has one of these shapes, else it has to be one number.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return False
    if value.shape not in shapes:
        raise ValueError(
            f"{where}: expected {key} {tuple(shapes[0])} as the parameter, got "
            f"{tuple(value.shape)}; {DROP}"
        )
    return True


def made(
    states: dict[Any, dict[str, Any]], groups: list[tuple[dict[str, Any], list[Any]]]
) -> dict[str, Any]:
    """Makes the state of an optimizer of the head alone, of settings and parameters by group."""
    made_groups = [settings | {"params": params} for settings, params in groups]
    return {"state": states, "param_groups": made_groups}
