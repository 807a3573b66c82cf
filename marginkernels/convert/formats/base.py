# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines a format, and reads what a tree of tensors has about its classes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import optimizers, trees
from ..checkpoint import Checkpoint, Parameter, Places
from ..files import FileRows, Placed
from ..optimizers import DROP, Located
from ..rows import Rows


class Format:
    """Reads and writes the checkpoints of one project.

    Attributes:
        name: for ``--to`` and ``--from``.
        has_centers, has_bias, has_optimizer: whether it has a place for sub-centres, for a bias,
            and for the optimizer's state of another format's classes.
        folder: whether it writes a folder.
        per_rank: whether that has a file for each rank.
    """

    name: str
    has_centers = False
    has_bias = False
    has_optimizer = False
    folder = False
    per_rank = False

    def recognised(self, inputs: list[Path], key: str | None) -> str | None:
        """Returns by what this format is known in the inputs, or None."""
        raise NotImplementedError

    def read(self, inputs: list[Path], key: str | None, keep_state: bool) -> Checkpoint:
        """Reads a checkpoint, all but its rows."""
        raise NotImplementedError

    def write(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        """Writes a checkpoint to a file or into a folder."""
        raise NotImplementedError

    def check(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        """Raises ValueError where the checkpoint does not fit the format, or the output."""
        if checkpoint.sub_centers > 1 and not self.has_centers:
            raise ValueError(
                f"--to {self.name}: expected one centre of each class, got "
                f"{checkpoint.sub_centers}; --reduce makes one of them"
            )
        if "bias" in checkpoint.parameters and not self.has_bias:
            raise ValueError(
                f"--to {self.name}: expected no bias, got one, which has no place there"
            )
        if world_size != 1:
            raise ValueError(
                f"--world-size: expected none for {self.name}, which is not split by ranks, got "
                f"{world_size}"
            )


def require_weight(value: Any, where: str) -> Tensor:
    """Raises ValueError unless a value can be class weights."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: expected class weights, got {type(value).__name__}")
    if value.ndim != 2 or not value.is_floating_point() or not value.numel():
        raise ValueError(
            f"{where}: expected class weights of two dimensions, got {tuple(value.shape)} "
            f"{value.dtype}"
        )
    return value


class TreeReader:
    """Reads weight, bias and their optimizer's state from the tree of one file.

    Args:
        file, tree: the file and its content.
        weight: the path of the class weights.
        transposed: whether they are (D, C K).
    """

    def __init__(self, file: Path, tree: Any, weight: trees.Path, transposed: bool):
        self.file, self.tree, self.transposed = file, tree, transposed
        self.parameters: dict[str, Parameter] = {}
        self.places: Places = {}
        self.states: list[trees.Path] = []
        self._add("weight", weight)

    def add_bias(self, path: trees.Path) -> None:
        """Reads a bias of the classes, if it is one: that of SphereFace2 is a number."""
        bias = trees.at(self.tree, path)
        if isinstance(bias, Tensor) and bias.ndim == 1:
            self._add("bias", path)

    def find_state(self, keep: bool) -> None:
        """Reads the optimizer's states that have the shapes of weight and bias, if there are any.

        Raises:
            ValueError: they may be those of other parameters.
        """
        found = {
            name: optimizers.by_shape(self.tree, self._shapes(name)) for name in self.parameters
        }
        if keep and any(found.values()):
            for name, states in found.items():
                self._require_own(name, len(states))
        for name, states in found.items():
            for located in states:
                self.add_state(name, located, keep)

    def add_state(self, name: str, located: Located, keep: bool) -> None:
        """Reads the optimizer's state of the weight, or of the bias."""
        start = (*located.path, "state", located.index)
        if located.state:
            self.states.append(start)
        if not keep:
            return
        for key, value in located.state.items():
            path = (*start, key)
            per_row = optimizers.is_per_row(
                key, value, self._shapes(name), f"{self.file}: {trees.named(start)}"
            )
            self.parameters[name].state[key] = self._rows(path) if per_row else value
            if per_row:
                self.places[path] = (name, key)
        self.parameters[name].settings = located.settings

    def _require_own(self, name: str, states: int) -> None:
        """Raises ValueError unless one state can be that of the parameter, and of no other."""
        shape = self._shapes(name)[0]
        starts = [path for path, _ in optimizers.optimizers_in(self.tree)]
        others = [
            trees.named(path)
            for path, value in trees.leaves(self.tree)
            if isinstance(value, Tensor) and value.shape == shape and path not in self.places
            if not any(path[: len(start)] == start for start in starts)
        ]
        if states == 1 and not others:
            return
        got = f", and {', '.join(others)} of that shape" if others else ""
        raise ValueError(
            f"{self.file}: expected optimizer state of one parameter with the shape of the "
            f"classes' {name}, {tuple(shape)}, got {states}{got}; {DROP}"
        )

    def _shapes(self, name: str) -> list[torch.Size]:
        """Returns the shapes that a state of the parameter may have."""
        transposed = self.transposed and name == "weight"
        shape = Placed(self.parameters[name].rows, transposed).shape
        return optimizers.shapes_of(shape, transposed)

    def _add(self, name: str, path: trees.Path) -> None:
        """Reads a parameter, which stands under several names where they are tied."""
        self.parameters[name] = Parameter(self._rows(path))
        tensor = trees.at(self.tree, path)
        for other, value in trees.leaves(self.tree):
            if isinstance(value, Tensor) and _is_same(value, tensor):
                self.places[other] = (name, None)

    def _rows(self, path: trees.Path) -> Rows:
        tensor = trees.at(self.tree, path)
        return FileRows(self.file, path, tensor, self.transposed and tensor.ndim == 2)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same memory, in the same order."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(), b.shape, b.stride(), b.dtype
    )  # fmt: skip


def filled(tree: Any, checkpoint: Checkpoint, places: Places, transposed: bool) -> Any:
    """Returns the tree with the checkpoint's rows at their places."""
    for path, (name, key) in places.items():
        rows = checkpoint.parameters[name].value(key)
        tree = trees.replaced(tree, path, Placed(rows, transposed and len(rows.shape) == 2))
    return tree


def new_optimizer(checkpoint: Checkpoint, names: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the state of an optimizer of weight and bias alone, or None where there is none.

    They are in one group where their settings are the same.

    Args:
        names: what the optimizer has in the place of each parameter.
    """
    if checkpoint.parameters["weight"].settings is None:
        return None
    states: dict[Any, dict[str, Any]] = {}
    groups: list[tuple[dict[str, Any], list[Any]]] = []
    for name, parameter in checkpoint.parameters.items():
        if parameter.state:
            states[names[name]] = {
                key: Placed(value) if isinstance(value, Rows) else value
                for key, value in parameter.state.items()
            }
        if groups and parameter.settings in (None, groups[-1][0]):
            groups[-1][1].append(names[name])
        else:
            groups.append((parameter.settings or {}, [names[name]]))
    return optimizers.made(states, groups)
