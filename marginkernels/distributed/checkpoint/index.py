# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads the index of a checkpoint, which says which tensors and settings there are, and where."""

import io
import math
import pickle
import zlib
from collections import defaultdict
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from . import files

# the classes that torch.distributed.checkpoint writes into its index, beside numbers, strings and
# dtypes
_NAMES = {
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


class Index:
    """Reads the index of a checkpoint.

    Entries have a key and a path: the names that lead to them, ``("model", "head.weight")`` or
    ``("optimizer", "state", "head.weight", "momentum_buffer")``.

    Raises:
        ValueError: there is no index, or one that holds anything else.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.warnings: list[str] = []
        self._sums = files.read_sums(folder)
        self._metadata = _metadata(folder, self._sums)
        self.entries: dict[str, Any] = self._metadata.state_dict_metadata
        self._paths = self._metadata.planner_data
        if self._sums is None:
            self.warnings.append("has no checksums: whether its bytes are as saved is not checked")

    def under(self, *start: str) -> dict[str, tuple[Any, ...]]:
        """Returns the rest of the path of each entry whose path begins with ``start``, by key."""
        n = len(start)
        return {key: path[n:] for key, path in self._paths.items() if path[:n] == start}

    def grouped(self, *start: str) -> dict[str, dict[str, tuple[Any, ...]]]:
        """Groups the entries :meth:`under` ``start`` by the next name on the path."""
        groups: dict[str, dict[str, tuple[Any, ...]]] = defaultdict(dict)
        for key, (name, *rest) in self.under(*start).items():
            groups[name][key] = tuple(rest)
        return dict(groups)

    def shape(self, key: str) -> torch.Size | None:
        """Returns the shape of an entry that is a tensor, and None for any other entry.

        Raises:
            ValueError: a part of the tensor is missing.
        """
        entry = self.entries[key]
        if not isinstance(entry, TensorStorageMetadata):
            return None
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"{self.folder}: {key} is not whole")
        return entry.size

    def dtype(self, key: str) -> torch.dtype:
        """Returns the type of an entry that is a tensor."""
        return self.entries[key].properties.dtype

    def pieces(self, key: str) -> list[ChunkStorageMetadata]:
        """Returns the places of the pieces of an entry that is a tensor."""
        return self.entries[key].chunks

    def read(self, key: str, piece: int | None = None) -> Any:
        """Returns one of the :meth:`pieces` of an entry, or the value of one in a single piece."""
        if piece is None:
            [info] = self._storage(key)
        else:
            info = self._storage(key)[piece]
        with open(self.folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.folder}: {key}: {error}") from error

    def check_bytes(self, parts: tuple[str, ...], rank: int, ranks: int) -> None:
        """Raises ValueError where bytes of these parts have changed; each rank checks its share."""
        if self._sums is None:
            return
        found: set[tuple[str, int]] = set()
        for part in parts:
            for key in self.under(part):
                for info in self._storage(key):
                    last = (info.offset + max(info.length, 1) - 1) // files.BLOCK
                    numbers = range(info.offset // files.BLOCK, last + 1)
                    found.update((info.relative_path, number) for number in numbers)
        blocks = sorted(found)
        share = blocks[len(blocks) * rank // ranks : len(blocks) * (rank + 1) // ranks]
        files.check_blocks(self.folder, self._sums, share)

    def reader(self) -> FileSystemReader:
        """Returns the reader of tensors for ``torch.distributed.checkpoint``."""
        return _Reader(self.folder, self._metadata)

    def _storage(self, key: str) -> list[Any]:
        """Finds the pieces of an entry."""
        chunks = getattr(self.entries[key], "chunks", None)
        pieces = [None] if chunks is None else [chunk.offsets for chunk in chunks]
        try:
            return [self._metadata.storage_data[MetadataIndex(key, piece)] for piece in pieces]
        except KeyError as error:
            raise ValueError(f"{self.folder}: {key} has no data") from error


class _Reader(FileSystemReader):
    """Reads with an index that has been read and checked before."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def _metadata(folder: Path, sums: dict[str, list[int]] | None) -> Metadata:
    """Reads the index itself, and checks its checksum where there are any."""
    path = folder / ".metadata"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"path: expected a checkpoint, got {folder}, without an index") from error
    blocks = range(0, len(content), files.BLOCK)
    changed = sums is not None and sums.get(path.name) != [
        zlib.crc32(content[start : start + files.BLOCK]) for start in blocks
    ]
    try:
        # bytes that have changed may ask the quicker unpickler for any amount of memory
        found = (_CarefulUnpickler if changed else _Unpickler)(io.BytesIO(content)).load()
        if not isinstance(found, Metadata) or not isinstance(found.planner_data, dict):
            raise ValueError(f"expected an index, got {type(found).__name__}")
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    if changed:
        raise ValueError(f"{path}: not as saved: its checksum differs")
    return found


def _member(kind: Any, name: Any) -> Enum:
    """Returns a member of an enumeration: Python 3.11.0 to 3.11.3 pickles one by ``getattr``."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"unexpected getattr({kind}, {name!r}) in an index")
    return kind[name]


def _check_known(module: str, name: str) -> None:
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    if not (is_dtype or name in _NAMES.get(module, ())):
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in the index of a checkpoint")


class _Unpickler(pickle.Unpickler):
    """Unpickles the classes of an index, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        _check_known(module, name)
        return super().find_class(module, name)


class _CarefulUnpickler(pickle._Unpickler):
    """Does the same in Python, which sets aside no memory for sizes that the bytes announce."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        _check_known(module, name)
        return super().find_class(module, name)
