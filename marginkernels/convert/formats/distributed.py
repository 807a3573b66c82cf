# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads and writes the folders of :mod:`marginkernels.distributed.checkpoint`."""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ...distributed.checkpoint import write_state
from ...distributed.checkpoint.index import Index
from .. import optimizers, trees
from ..checkpoint import Checkpoint, Parameter, Places
from ..files import Placed
from ..rows import Rows
from .base import Format, filled, new_optimizer

_PARTS = ("model", "optimizer", "extra")
# names of the class weights of a head, alone or in a model
_USUAL = ("weight", "head.weight")


class Distributed(Format):
    """Reads and writes a folder that loads on any number of ranks."""

    name = "distributed"
    folder = True
    has_centers = has_bias = has_optimizer = True

    def recognised(self, inputs: list[Path], key: str | None) -> str | None:
        if len(inputs) == 1 and (inputs[0] / ".metadata").is_file():
            return "a folder with .metadata"
        return None

    def read(self, inputs: list[Path], key: str | None, keep_state: bool) -> Checkpoint:
        if self.recognised(inputs, key) is None:
            raise ValueError(
                f"--from {self.name}: expected a folder, got {', '.join(map(str, inputs))}"
            )
        [folder] = inputs
        index = Index(folder)
        index.check_bytes(_PARTS, 0, 1)
        tree = _tree(index)
        weight = _weight(folder, tree["model"], key)
        names = {"weight": weight}
        bias = weight.removesuffix("weight") + "bias"
        found = tree["model"].get(bias)
        if weight.endswith("weight") and isinstance(found, Rows) and len(found.shape) == 1:
            names["bias"] = bias
        parameters: dict[str, Parameter] = {}
        places: Places = {}
        states = tree.get("optimizer", {}).get("state", {})
        groups = tree.get("optimizer", {}).get("param_groups", []) if keep_state else []
        for name, full in names.items():
            settings = optimizers.settings_of(groups, full)
            parameters[name] = Parameter(tree["model"][full], settings=settings)
            places["model", full] = (name, None)
            for state, value in states.get(full, {}).items() if keep_state else ():
                _require_per_row(folder, full, state, value, parameters[name].rows)
                parameters[name].state[state] = value
                if isinstance(value, Rows):
                    places["optimizer", "state", full, state] = (name, state)
        with_state = [("optimizer", "state", full) for full in names.values() if full in states]
        note = f"read {self.name}: {weight} {tuple(parameters['weight'].rows.shape)} of {folder}"
        return Checkpoint(
            self.name, inputs, parameters, [tree], places, with_state,
            notes=[note, *(f"{folder}: {warning}" for warning in index.warnings)],
        )  # fmt: skip

    def write(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        if checkpoint.format == self.name:
            tree = filled(checkpoint.contents[0], checkpoint, checkpoint.places, False)
        else:
            names = {name: name for name in checkpoint.parameters}
            model = {name: Placed(p.rows) for name, p in checkpoint.parameters.items()}
            tree = {"model": model}
            optimizer = new_optimizer(checkpoint, names)
            if optimizer is not None:
                tree["optimizer"] = optimizer
        for path, value in list(trees.leaves(tree)):
            rows = value.rows if isinstance(value, Placed) else value
            if isinstance(rows, Rows):
                tree = trees.replaced(tree, path, _Streamed(rows))
        try:
            write_state(out, tree, None)
        except RuntimeError as error:  # of storage
            raise OSError(str(error)) from error


class _StoredRows(Rows):
    """Reads rows of a tensor in a folder, of which one piece is held at a time."""

    def __init__(self, index: Index, key: str):
        shape = index.shape(key)
        assert shape is not None
        self.shape, self.dtype = shape, index.dtype(key)
        self._index, self._key = index, key
        pieces = index.pieces(key)
        self._order = sorted(range(len(pieces)), key=lambda i: pieces[i].offsets[0])
        for piece in pieces:
            if piece.sizes[1:] != shape[1:]:
                raise ValueError(
                    f"{index.folder}: {key}: expected pieces of whole rows, got "
                    f"{tuple(piece.sizes)}"
                )
        self._first = torch.tensor([pieces[i].offsets[0] for i in self._order])
        self._held: tuple[int, Tensor] | None = None

    def read(self, index: Tensor) -> Tensor:
        piece_of = torch.bucketize(index, self._first, right=True) - 1
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for i in piece_of.unique().tolist():
            here = piece_of == i
            rows[here] = self._piece(i)[index[here] - self._first[i]]
        return rows

    def _piece(self, i: int) -> Tensor:
        if self._held is None or self._held[0] != i:
            self._held = None  # before the next one is there
            self._held = i, self._index.read(self._key, self._order[i])
        return self._held[1]


class _Streamed(Tensor):
    """Gives rows to ``torch.distributed.checkpoint`` block by block."""

    rows: Rows

    def __new__(cls, rows: Rows) -> "_Streamed":
        """Marks rows as a tensor in pieces."""
        self = torch.empty(0, dtype=rows.dtype).as_subclass(cls)
        self.rows = rows
        return self

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.rows.dtype)
        items = []
        starts = self.rows.starts()
        for start, stop in itertools.pairwise(starts):
            rest = self.rows.shape[1:]
            offsets = torch.Size([start] + [0] * len(rest))
            piece = ChunkStorageMetadata(offsets, torch.Size([stop - start, *rest]))
            data = TensorWriteData(piece, properties, self.rows.shape)
            item = WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, None, data)
            items.append(item)
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        starts = self.rows.starts()
        start = index.offset[0]
        return self.rows.read(torch.arange(start, starts[starts.index(start) + 1]))


def _tree(index: Index) -> dict[str, Any]:
    """Returns the content of a folder: tensors as rows, everything else as it is."""
    tree: dict[str, Any] = {}
    for part in _PARTS:
        paths = index.under(part)
        values = {
            key: _StoredRows(index, key) if index.shape(key) else index.read(key) for key in paths
        }
        if values:
            tree[part] = unflatten_state_dict(values, paths)
    return tree


def _weight(folder: Path, model: dict[str, Any], key: str | None) -> str:
    """Finds the name of the class weights."""
    matrices = {
        name: tuple(value.shape)
        for name, value in model.items()
        if isinstance(value, Rows) and len(value.shape) == 2
    }
    wanted = _USUAL if key is None else (key,)
    named = [name for name in matrices if name in wanted]
    if len(named) == 1:
        return named[0]
    shown = ", ".join(f"{name} {shape}" for name, shape in matrices.items())
    raise ValueError(
        f"{folder}: expected one matrix {' or '.join(wanted)} (--key names another), got "
        f"{shown or 'none'}"
    )


def _require_per_row(folder: Path, name: str, state: str, value: Any, rows: Rows) -> None:
    if isinstance(value, Rows) and len(value) != len(rows):
        raise ValueError(
            f"{folder}: expected {state} of {name} with {len(rows)} rows, got {tuple(value.shape)}"
        )
