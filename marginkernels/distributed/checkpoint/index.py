# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The index of a checkpoint: which tensors and settings there are, and where."""

import io
import math
import pickle
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from . import files

# all that torch.distributed.checkpoint writes into its index, beside numbers, strings and dtypes
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
    """Reads the index; ValueError if there is none, or one that holds anything else.

    Entries have a key and a path: the names that lead to them, ``("model", "head.weight")`` or
    ``("optimizer", "state", "head.weight", "momentum_buffer")``.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.warnings = []
        self._sums = files.read_sums(folder)
        self._metadata = _metadata(folder, self._sums)
        self.entries = self._metadata.state_dict_metadata
        self._paths = self._metadata.planner_data
        if self._sums is None:
            self.warnings.append("has no checksums: whether its bytes are as saved is not checked")

    def under(self, *start: str) -> dict[str, tuple]:
        """Returns the rest of the path of each entry whose path starts so, by key."""
        n = len(start)
        return {key: path[n:] for key, path in self._paths.items() if path[:n] == start}

    def grouped(self, *start: str) -> dict[str, dict[str, tuple]]:
        """Groups the same by the next name on the path."""
        groups = defaultdict(dict)
        for key, (name, *rest) in self.under(*start).items():
            groups[name][key] = tuple(rest)
        return dict(groups)

    def shape(self, key: str) -> torch.Size | None:
        """Returns that of a tensor, None for anything else; ValueError if a part is missing."""
        entry = self.entries[key]
        if not isinstance(entry, TensorStorageMetadata):
            return None
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise ValueError(f"{self.folder}: {key} is not whole")
        return entry.size

    def read(self, key: str) -> Any:
        """Returns the value of an entry that is in one piece."""
        [info] = self._storage(key)
        with open(self.folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.folder}: {key}: {error}") from error

    def check_bytes(self, parts: tuple[str, ...], rank: int, ranks: int) -> None:
        """ValueError where bytes of these parts have changed; each rank checks its share."""
        if self._sums is None:
            return
        blocks = set()
        for part in parts:
            for key in self.under(part):
                for info in self._storage(key):
                    last = (info.offset + max(info.length, 1) - 1) // files.BLOCK
                    numbers = range(info.offset // files.BLOCK, last + 1)
                    blocks.update((info.relative_path, number) for number in numbers)
        blocks = sorted(blocks)
        share = blocks[len(blocks) * rank // ranks : len(blocks) * (rank + 1) // ranks]
        files.check_blocks(self.folder, self._sums, share)

    def reader(self) -> FileSystemReader:
        """Returns the reader of tensors for ``torch.distributed.checkpoint``."""
        return _Reader(self.folder, self._metadata)

    def _storage(self, key: str) -> list:
        """Finds the pieces of an entry."""
        chunks = getattr(self.entries[key], "chunks", None)
        pieces = [None] if chunks is None else [chunk.offsets for chunk in chunks]
        try:
            return [self._metadata.storage_data[MetadataIndex(key, piece)] for piece in pieces]
        except KeyError as error:
            raise ValueError(f"{self.folder}: {key} has no data") from error


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_, **__) -> Metadata:
        self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def _metadata(folder: Path, sums: dict[str, list[int]] | None) -> Metadata:
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
        # bytes that have changed may ask the quicker one for any amount of memory
        found = (_CarefulUnpickler if changed else _Unpickler)(io.BytesIO(content)).load()
        if not isinstance(found, Metadata) or not isinstance(found.planner_data, dict):
            raise ValueError(f"expected an index, got {type(found).__name__}")
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    if changed:
        raise ValueError(f"{path}: not as saved: its checksum differs")
    return found


class _KnownNames:
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in the index of a checkpoint")


class _Unpickler(_KnownNames, pickle.Unpickler):
    pass


class _CarefulUnpickler(_KnownNames, pickle._Unpickler):
    pass
