# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads and writes the files of insightface's arcface_torch, one for each rank.

Its ``train_v2.py`` writes ``checkpoint_gpu_{rank}.pt`` with the classes of the rank in
``state_dict_softmax_fc``, and their optimizer's state as that of the last parameter. Files with
the classes alone, a tensor or ``{"weight": ...}``, are read too, as those of earlier versions,
``rank_{rank}_softmax_weight.pt``.
"""

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files, optimizers, trees
from ..checkpoint import Checkpoint, Parameter
from ..rows import Joined, Part, Rows
from .base import Format, TreeReader, filled, new_optimizer, require_weight

_HEAD, _OPTIMIZER = "state_dict_softmax_fc", "state_optimizer"
# the same on all ranks
_COUNTERS = ("epoch", "global_step")


class Name(NamedTuple):
    """Splits the name of a rank's file around the rank."""

    before: str
    rank: str
    after: str

    def of(self, rank: int) -> str:
        """Returns the name of another rank's file."""
        return f"{self.before}{rank:0{len(self.rank)}d}{self.after}"


def split(name: str) -> Name | None:
    """Finds the rank in a name: behind gpu or rank, or at the end."""
    found = re.fullmatch(r"(.*(?:gpu|rank)_?)(\d+)(.*\.(?:pt|pth))", name)
    found = found or re.fullmatch(r"(.*?)(\d+)(\.(?:pt|pth))", name)
    return Name(*found.groups()) if found else None


def split_evenly(num_classes: int, world_size: int) -> list[int]:
    """Returns the classes of each rank: C // W, and one more on the first C % W ranks."""
    each, more = divmod(num_classes, world_size)
    return [each + (rank < more) for rank in range(world_size)]


class Insightface(Format):
    """Reads and writes a folder of files, one for each rank."""

    name = "insightface"
    folder = per_rank = has_optimizer = True

    def recognised(self, inputs: list[Path], key: str | None) -> str | None:
        if len(inputs) == 1 and inputs[0].is_file():
            tree = files.mapped(inputs[0])
            if isinstance(tree, Tensor) or (isinstance(tree, dict) and _HEAD in tree):
                return f"{inputs[0].name}, of one rank"
            return None
        if len(inputs) == 1 and (inputs[0] / ".metadata").exists():
            return None
        return f"{len(_ranks(inputs))} files, one for each rank"

    def read(self, inputs: list[Path], key: str | None, keep_state: bool) -> Checkpoint:
        if key is not None:
            raise ValueError(f"--key: expected none for {self.name}, got {key}")
        found = _ranks(inputs)
        readers = [_reader(file, keep_state) for file in found]
        _require_alike(readers)
        joined = readers[0].parameters["weight"]
        weight = Parameter(_joined(readers, None), dict(joined.state), joined.settings)
        for state, value in joined.state.items():
            if isinstance(value, Rows):
                weight.state[state] = _joined(readers, state)
        _require_split([len(reader.parameters["weight"].rows) for reader in readers], found)
        kept = [reader.tree for reader in readers]
        named = f"1 file, {found[0]}"
        if len(found) > 1:
            named = f"{len(found)} files, {found[0]} to {found[-1].name}"
        places = {p: v for p, v in readers[0].places.items() if isinstance(kept[0], dict)}
        checkpoint = Checkpoint(
            self.name, found, {"weight": weight}, kept, places, readers[0].states,
             notes=[f"read {self.name}: {named}"],
        )  # fmt: skip
        if isinstance(kept[0], Tensor) and keep_state:
            checkpoint.notes.append("momentum: not read, as no file has the optimizer's settings")
        return checkpoint

    def check(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        super().check(checkpoint, out, 1)
        if checkpoint.num_classes < world_size:
            raise ValueError(
                f"--world-size: expected a class for each rank at least, got {world_size} for "
                f"{checkpoint.num_classes} classes"
            )

    def write(self, checkpoint: Checkpoint, out: Path, world_size: int) -> None:
        template = Name("checkpoint_gpu_", "0", ".pt")
        if checkpoint.format == self.name and checkpoint.places:
            template = split(checkpoint.files[0].name) or template
        start = 0
        for rank, size in enumerate(split_evenly(checkpoint.num_classes, world_size)):
            weight = checkpoint.parameters["weight"]
            part = weight.part(partial(Part, start=start, stop=start + size))
            own = replace(checkpoint, parameters={"weight": part})
            files.save(_tree_of(own, rank), out / template.of(rank))
            start += size


def _tree_of(checkpoint: Checkpoint, rank: int) -> Any:
    """Returns the content of a rank's file, of its own classes."""
    if checkpoint.format == Insightface.name and checkpoint.places:
        kept = checkpoint.contents[rank % len(checkpoint.contents)]
        return filled(kept, checkpoint, checkpoint.places, False)
    tree: dict[str, Any] = {_HEAD: {"weight": files.Placed(checkpoint.weight)}}
    optimizer = new_optimizer(checkpoint, {"weight": 0})
    return tree if optimizer is None else tree | {_OPTIMIZER: optimizer}


def _ranks(inputs: list[Path]) -> list[Path]:
    """Returns the files in the order of their ranks, after checks that none is missing."""
    if len(inputs) == 1 and inputs[0].is_dir():
        return _ranks_in(inputs[0])
    by_rank: dict[int, Path] = {}
    for file in inputs:
        name = split(file.name)
        if name is None:
            raise ValueError(f"{file}: expected a name with a rank, as checkpoint_gpu_0.pt")
        if int(name.rank) in by_rank:
            raise ValueError(f"{file}: expected each rank once, got {by_rank[int(name.rank)]} too")
        by_rank[int(name.rank)] = file
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise ValueError(
                f"expected the files of ranks 0 to {max(by_rank)}, got none of rank {rank}"
            )
    found = [by_rank[rank] for rank in range(len(by_rank))]
    following = found[-1].with_name(split(found[-1].name).of(len(found)))  # type: ignore[union-attr]
    if following.exists():
        raise ValueError(
            f"expected the files of all ranks, got none of rank {len(found)}: {following}"
        )
    return found


def _ranks_in(folder: Path) -> list[Path]:
    """Returns the files of a folder with one set of them."""
    sets: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        name = split(file.name)
        if name is not None and not file.stem.endswith("_mom"):
            sets[name.before, name.after].append(file)
    if len(sets) != 1:
        shown = ", ".join(f"{before}*{after}" for before, after in sets) or "none"
        raise ValueError(f"{folder}: expected one set of files, one for each rank, got {shown}")
    [found] = sets.values()
    return _ranks(found)


def _reader(file: Path, keep_state: bool) -> TreeReader:
    """Reads one rank's file."""
    tree = files.mapped(file)
    path: trees.Path = ()
    if not isinstance(tree, Tensor):
        path = (_HEAD, "weight") if isinstance(tree, dict) and _HEAD in tree else ("weight",)
    try:
        weight = trees.at(tree, path)
    except (KeyError, TypeError, IndexError) as error:
        got = list(tree)[:6] if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{file}: expected {trees.named(path)}, got {got}") from error
    require_weight(weight, f"{file}: {trees.named(path)}")
    reader = TreeReader(file, tree, path, False)
    if not isinstance(tree, Tensor) and _OPTIMIZER in tree:
        reader.add_state("weight", optimizers.last(tree, (_OPTIMIZER,), file), keep_state)
    return reader


def _joined(readers: list[TreeReader], key: str | None) -> Rows:
    """Joins the rows of all ranks."""
    return Joined([reader.parameters["weight"].value(key) for reader in readers])


def _require_alike(readers: list[TreeReader]) -> None:
    """Raises ValueError unless the files of all ranks are of one kind, and of one step."""
    first = readers[0]
    for reader in readers[1:]:
        for what, expected, got in _compared(first, reader):
            same = torch.equal(expected, got) if isinstance(got, Tensor) else expected == got
            if not same:
                raise ValueError(
                    f"{reader.file}: expected {what} {expected} as in {first.file}, got {got}"
                )


def _compared(first: TreeReader, reader: TreeReader) -> list[tuple[str, Any, Any]]:
    """Lists what has to be the same in two ranks' files."""
    mine, theirs = first.parameters["weight"], reader.parameters["weight"]
    pairs: list[tuple[str, Any, Any]] = [
        ("features", mine.rows.shape[1], theirs.rows.shape[1]),
        ("weights of", mine.rows.dtype, theirs.rows.dtype),
        ("optimizer state", sorted(mine.state), sorted(theirs.state)),
        ("places", sorted(map(trees.named, first.places)), sorted(map(trees.named, reader.places))),
    ]
    for key, value in mine.state.items():
        if not isinstance(value, Rows) and key in theirs.state:
            pairs.append((key, value, theirs.state[key]))
    for key in _COUNTERS:
        if isinstance(first.tree, dict) and isinstance(reader.tree, dict):
            pairs.append((key, first.tree.get(key), reader.tree.get(key)))
    return pairs


def _require_split(sizes: list[int], found: list[Path]) -> None:
    """Raises ValueError unless the ranks have the classes that insightface gives them."""
    for file, size, expected in zip(
        found, sizes, split_evenly(sum(sizes), len(sizes)), strict=True
    ):
        if size != expected:
            raise ValueError(
                f"{file}: expected {expected} of {sum(sizes)} classes on {len(sizes)} ranks, got "
                f"{size}: a rank's file is missing, or of another run"
            )
