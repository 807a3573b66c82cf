# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads and writes the checkpoints that have all classes in one file, under a name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files, trees
from ..checkpoint import Checkpoint
from .base import Format, TreeReader, filled, new_optimizer, require_weight

# what stands before the name of a head in dictionaries of states
_BEFORE = {
    "criterion", "head", "loss", "loss_func", "loss_fn", "model", "model_state_dict", "module",
    "state_dict",
}  # fmt: skip

NewTree = Callable[[dict[str, Any], dict[str, Any] | None], Any]


def bare(head: dict[str, Any], _: dict[str, Any] | None) -> Any:
    """Returns the state of a head as all there is."""
    return head


@dataclass
class OneFile(Format):
    """Reads and writes files of ``torch.save``, or safetensors.

    Args:
        name: of the format.
        keys: the names of the class weights; the first one is written.
        transposed: whether they are (D, C K).
        has_centers, has_bias, has_optimizer: see :class:`Format`. The bias is beside the weight.
        tree: makes the content of a file that another format's classes go to, of the head's state
            and that of its optimizer.
    """

    name: str
    keys: tuple[str, ...]
    transposed: bool = False
    has_centers: bool = False
    has_bias: bool = False
    tree: NewTree = bare
    has_optimizer: bool = False

    def recognised(self, inputs: list[Path], key: str | None) -> str | None:
        if len(inputs) != 1 or not inputs[0].is_file():
            return None
        tree = files.mapped(inputs[0])
        paths = self._paths(tree)
        if key is not None:
            paths = [path for path in paths if trees.named(path) == key]
        if not paths:
            return None
        shapes = [(trees.named(path), tuple(trees.at(tree, path).shape)) for path in paths]
        return ", ".join(f"{name} {shape}" for name, shape in shapes)

    def read(self, inputs: list[Path], key: str | None, keep_state: bool) -> Checkpoint:
        if len(inputs) != 1 or not inputs[0].is_file():
            raise ValueError(
                f"--from {self.name}: expected one file, got {', '.join(map(str, inputs))}"
            )
        [file] = inputs
        tree = files.mapped(file)
        path = self._path(file, tree, key)
        weight = require_weight(trees.at(tree, path), f"{file}: {trees.named(path)}")
        reader = TreeReader(file, tree, path, self.transposed)
        bias = (*path[:-1], path[-1].removesuffix("weight") + "bias")
        if self.has_bias and bias[-1] in trees.at(tree, path[:-1]):
            reader.add_bias(bias)
        reader.find_state(keep_state)
        note = f"read {self.name}: {trees.named(path)} {tuple(weight.shape)} of {file}"
        return Checkpoint(
            self.name, [file], reader.parameters, [tree], reader.places, reader.states,
            notes=[note],
        )  # fmt: skip

    def check(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        super().check(checkpoint, out, world_size)
        if files.is_safetensors(out):
            files.require_flat(self._content(checkpoint), out)

    def write(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        files.save(self._content(checkpoint), out)

    def _content(self, checkpoint: Checkpoint) -> Any:
        """Returns the content of the file: all that was there, or the classes alone."""
        if checkpoint.format == self.name:
            return filled(checkpoint.contents[0], checkpoint, checkpoint.places, self.transposed)
        key = self.keys[0]
        names = {"weight": key, "bias": key.removesuffix("weight") + "bias"}
        head = {
            names[name]: files.Placed(parameter.rows, self.transposed and name == "weight")
            for name, parameter in checkpoint.parameters.items()
        }
        return self.tree(head, new_optimizer(checkpoint, {"weight": 0, "bias": 1}))

    def _paths(self, tree: Any) -> list[trees.Path]:
        """Returns the paths of tensors that have this format's name, in any usual container."""
        return [
            path
            for path, value in trees.leaves(tree)
            if isinstance(value, Tensor) and value.ndim == 2 and self._is_named(path)
        ]

    def _is_named(self, path: trees.Path) -> bool:
        words = trees.named(path).split(".")
        while words:
            if ".".join(words) in self.keys:
                return True
            if words.pop(0) not in _BEFORE:
                return False
        return False

    def _path(self, file: Path, tree: Any, key: str | None) -> trees.Path:
        """Finds the class weights, by the key that was given or by this format's names."""
        if key is None:
            paths, wanted = self._paths(tree), " or ".join(self.keys)
        else:
            paths = [path for path, _ in trees.leaves(tree) if trees.named(path) == key]
            wanted = key
        if len(paths) == 1:
            return paths[0]
        shown = [trees.named(path) for path in paths] or matrices(tree)
        raise ValueError(
            f"{file}: expected one tensor {wanted} (--key names another), got {', '.join(shown)}"
        )


def matrices(tree: Any, most: int = 6) -> list[str]:
    """Names the largest matrices of a tree, as one of them may have the classes."""
    found = [
        (value.numel(), f"{trees.named(path)} {tuple(value.shape)}")
        for path, value in trees.leaves(tree)
        if isinstance(value, Tensor) and value.ndim == 2
    ]
    return [name for _, name in sorted(found, reverse=True)[:most]] or ["no matrix"]
