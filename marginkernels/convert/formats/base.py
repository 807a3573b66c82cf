# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines a format, and reads what a tree of tensors has about its classes."""

from pathlib import Path
from typing import Any

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
        has_centers, has_bias: whether it has a place for sub-centres, and for a bias.
        folder: whether it writes a folder.
        per_rank: whether that has a file for each rank.
    """

    name: str
    has_centers = False
    has_bias = False
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

    def check(self, checkpoint: Checkpoint, world_size: int) -> None:
        """Raises ValueError where the checkpoint does not fit the format."""
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
        self.settings: dict[str, Any] | None = None
        self._add("weight", weight)

    def add_bias(self, path: trees.Path) -> None:
        """Reads a bias of the classes, if it is one: that of SphereFace2 is a number."""
        bias = trees.at(self.tree, path)
        if isinstance(bias, Tensor) and bias.ndim == 1:
            self._add("bias", path)

    def find_state(self, keep: bool) -> None:
        """Reads the optimizer's state that has the shape of the weight, if there is one.

        Raises:
            ValueError: several parameters have the weight's shape.
        """
        shape = Placed(self.parameters["weight"].rows, self.transposed).shape
        found = optimizers.by_shape(self.tree, optimizers.shapes_of(shape, self.transposed))
        if len(found) > 1 and keep:
            raise ValueError(
                f"{self.file}: expected optimizer state of one parameter with the shape of the "
                f"class weights, {tuple(shape)}, got {len(found)}; {DROP}"
            )
        for located in found:
            self.add_state(located, keep)

    def add_state(self, located: Located, keep: bool) -> None:
        """Reads the optimizer's state of the weight, and of the bias behind it."""
        self._take_state("weight", located.path, located.index, located.state, keep)
        if "bias" in self.parameters and located.following:
            index = located.following_index
            self._take_state("bias", located.path, index, located.following, keep)
        self.settings = located.settings if keep else None

    def _add(self, name: str, path: trees.Path) -> None:
        self.parameters[name] = Parameter(self._rows(path))
        self.places[path] = (name, None)

    def _rows(self, path: trees.Path) -> Rows:
        tensor = trees.at(self.tree, path)
        return FileRows(self.file, path, tensor, self.transposed and tensor.ndim == 2)

    def _take_state(
        self, name: str, optimizer: trees.Path, index: Any, state: dict[str, Any], keep: bool
    ) -> None:
        start = (*optimizer, "state", index)
        if state:
            self.states.append(start)
        if not keep:
            return
        parameter = self.parameters[name]
        transposed = self.transposed and name == "weight"
        shapes = optimizers.shapes_of(Placed(parameter.rows, transposed).shape, transposed)
        for key, value in state.items():
            path = (*start, key)
            per_row = optimizers.is_per_row(
                key, value, shapes, f"{self.file}: {trees.named(start)}"
            )
            parameter.state[key] = self._rows(path) if per_row else value
            if per_row:
                self.places[path] = (name, key)


def filled(tree: Any, checkpoint: Checkpoint, places: Places, transposed: bool) -> Any:
    """Returns the tree with the checkpoint's rows at their places."""
    for path, (name, key) in places.items():
        rows = checkpoint.parameters[name].value(key)
        tree = trees.replaced(tree, path, Placed(rows, transposed and len(rows.shape) == 2))
    return tree


def new_optimizer(checkpoint: Checkpoint, names: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the state of an optimizer of weight and bias alone, or None where there is none.

    Args:
        names: what the optimizer has in the place of each parameter.
    """
    if checkpoint.settings is None:
        return None
    states = {
        names[name]: {
            key: Placed(value) if isinstance(value, Rows) else value
            for key, value in parameter.state.items()
        }
        for name, parameter in checkpoint.parameters.items()
        if parameter.state
    }
    params = [names[name] for name in checkpoint.parameters]
    return optimizers.made(checkpoint.settings, states, params)
