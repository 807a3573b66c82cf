# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checkpoints that move between world sizes, in the format of ``torch.distributed.checkpoint``.

Two things are added to it. An interrupted save leaves nothing that looks like a checkpoint: a
directory of the given name exists once all of it is written. And loading runs no code from the
files: tensors and settings are read by ``torch.load(weights_only=True)``, and the index by an
unpickler that knows the index's own classes and no other.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .distributed import in_group

# all that torch.distributed.checkpoint writes into its index, beside numbers, strings and dtypes
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}  # fmt: skip


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the state of model and optimizer into a new directory. Collective.

    Each rank writes what it holds; what all hold alike is written once. Files go to
    ``path + ".partial"``, which takes its name in one step at the end, so that ``path`` exists only
    as a whole checkpoint and earlier ones are not touched. ``torch.distributed.checkpoint.load``
    reads it too.

    Args:
        path: a directory that does not exist yet, on storage that all ranks share.
        model: the head, or a module that contains it; a module wrapped in DistributedDataParallel
            saves as the one inside.
        optimizer: of the model's parameters.
        process_group: the ranks that save; None: the default group, or this process alone.

    Raises:
        FileExistsError: on all ranks, if ``path`` exists.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    if _on_first(process_group, lambda: path.exists() or _clear(partial)):
        raise FileExistsError(f"path: expected a new directory, got {path}, which exists")
    writer = FileSystemWriter(partial)
    dcp.save(
        _state(model, optimizer),
        storage_writer=writer,
        process_group=process_group,
        no_dist=not in_group(),
    )
    _on_first(process_group, lambda: _publish(partial, path))


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Reads what :func:`save_checkpoint` wrote, whatever the number of ranks then and now, into
    model and optimizer in place. Collective.

    Args: as in :func:`save_checkpoint`; an optimizer without state gets it.

    Raises:
        FileNotFoundError: if there is no checkpoint, or a partial one only.
        CheckpointException: on all ranks, if the files do not fit the model, or hold anything but
            tensors and plain settings.
    """
    path = Path(path)
    if not _on_first(process_group, path.is_dir):
        raise FileNotFoundError(f"path: expected a checkpoint, got {path}, which does not exist")
    state = _state(model, optimizer)
    dcp.load(
        state,
        storage_reader=_Reader(path),
        planner=_Planner(),
        process_group=process_group,
        no_dist=not in_group(),
    )
    optimizers = [] if optimizer is None else optimizer
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    """By parameter names; an optimizer that has no state yet makes room for it."""
    model_state, optimizer_state = get_state_dict(model, [] if optimizer is None else optimizer)
    state = {"model": model_state}
    return state if optimizer is None else state | {"optimizer": optimizer_state}


def _on_first(group: dist.ProcessGroup | None, function: Callable[[], Any]) -> Any:
    """What the function returns or raises on the group's first rank, on all; they wait for it."""
    if not in_group():
        return function()
    result = [None, None]
    if dist.get_rank(group) == 0:
        try:
            result[0] = function()
        except OSError as error:
            result[1] = error
    dist.broadcast_object_list(result, group=group, group_src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _clear(partial: Path) -> None:
    """Removes what an interrupted save has left."""
    if partial.exists():
        shutil.rmtree(partial)


def _publish(partial: Path, path: Path) -> None:
    partial.rename(path)
    # the new name has to survive a crash of the machine too
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class _Planner(DefaultLoadPlanner):
    """Settings, such as a learning rate, have to pass the unpickler of weights first."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _Reader(FileSystemReader):
    def read_metadata(self, *_, **__) -> Metadata:
        with open(self._get_metadata_path(), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in the index of a checkpoint")
