# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads and writes files of tensors, those of ``torch.save`` and of safetensors, block by block.

The content of a file is a memory map. Rows are read from where the map says that they are: pages of
a map would stay in the process. A file that is written is laid out first, and filled after that.
"""

import ctypes
import itertools
import json
import mmap
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import set_default_mmap_options, skip_data

from . import trees
from .rows import BLOCK, Rows
from .zips import set_checksums

_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass
class Placed:
    """Says how rows stand in a file: as they are, or transposed, (D, N)."""

    rows: Rows
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the tensor in the file."""
        return self.rows.shape[::-1] if self.transposed else self.rows.shape


class FileRows(Rows):
    """Reads rows of a tensor in a file.

    Args:
        file, path: where the tensor is.
        tensor: the tensor, a view of the file.
        transposed: whether its columns are the rows.

    Raises:
        ValueError: the tensor has neither its rows nor its columns one after another, or its
            values are not those in the file.
    """

    def __init__(self, file: Path, path: trees.Path, tensor: Tensor, transposed: bool = False):
        rows = tensor.detach().t() if transposed else tensor.detach()
        self.file, self.shape, self.dtype = file, rows.shape, rows.dtype
        if rows.is_neg() or rows.is_conj() or rows.is_meta:
            kind = "meta tensor" if rows.is_meta else "lazily negated or conjugate view"
            raise ValueError(
                f"{file}: {trees.named(path)}: expected the values themselves, got a {kind}"
            )
        self._offset = _offset(rows)
        self._in_columns = not rows.is_contiguous()
        if self._in_columns and not rows.t().is_contiguous():
            raise ValueError(
                f"{file}: {trees.named(path)}: expected whole rows, got a view, of strides "
                f"{tensor.stride()}"
            )

    def read(self, index: Tensor) -> Tensor:
        with open(self.file, "rb", buffering=0) as opened:
            if len(index) and (index.diff() == 1).all():
                return self._span(opened, int(index[0]), int(index[-1]) + 1)
            found = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
            order = index.argsort()
            for at in self._clusters(index[order]):
                here = order[at]
                first, last = int(index[here[0]]), int(index[here[-1]])
                span = self._span(opened, first, last + 1)
                found[here] = span[index[here] - first]
        return found

    def _clusters(self, ascending: Tensor) -> list[slice]:
        """Splits numbers in order so that what lies between those of a part is read along."""
        most = max(1, 2 * BLOCK * len(self) // max(1, self.nbytes)) if self._in_columns else 1
        cuts, first = [0], 0
        gaps = (ascending.diff() > 1).nonzero().flatten().tolist()
        for gap in gaps:
            if int(ascending[gap + 1]) - int(ascending[first]) >= most:
                first = gap + 1
                cuts.append(first)
        return [slice(*pair) for pair in itertools.pairwise([*cuts, len(ascending)])]

    def _span(self, opened: IO[bytes], start: int, stop: int) -> Tensor:
        """Reads the rows from start to stop."""
        if not self._in_columns:
            rows = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
            self._fill(opened, rows, start * (rows[0].numel() if len(rows) else 0))
            return rows
        columns = torch.empty(self.shape[1], stop - start, dtype=self.dtype)
        for i, column in enumerate(columns):
            self._fill(opened, column, i * len(self) + start)
        return columns.t()

    def _fill(self, opened: IO[bytes], values: Tensor, at: int) -> None:
        """Reads values from the one with the number ``at`` on."""
        wanted = bytes_of(values)
        opened.seek(self._offset + at * self.dtype.itemsize)
        while wanted:
            size = opened.readinto(wanted)  # type: ignore[attr-defined]
            if not size:
                raise ValueError(f"{self.file}: expected more bytes, got the end of the file")
            wanted = wanted[size:]


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor."""
    size = tensor.numel() * tensor.itemsize
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _offset(tensor: Tensor) -> int:
    """Returns where the values of a tensor that is mapped begin in their file."""
    address = tensor.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            span, _, offset, *_ = line.split(maxsplit=4)
            start, stop = (int(word, 16) for word in span.split("-"))
            if start <= address < stop:
                return int(offset, 16) + address - start
    return 0  # there are no values


def is_safetensors(file: Path) -> bool:
    """Returns whether the name is that of a file of safetensors."""
    return file.suffix == ".safetensors"


def mapped(file: Path, *, writable: bool = False) -> Any:
    """Returns the content of a file, its tensors as views of the file.

    Raises:
        ValueError: the file is not one of tensors and plain settings.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        if is_safetensors(file):
            return _mapped_safetensors(file, writable)
        _require_stored(file)
        with set_default_mmap_options(mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE):
            tree = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        _require_dense(tree)
        return tree
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file}: expected a file of tensors and plain settings: {reason}"
        ) from error


def _require_stored(file: Path) -> None:
    """Raises ValueError where a map would show compressed bytes: torch.load does not look."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"{entry.filename} is compressed; torch.save(torch.load(...), ...) writes it "
                    "as it can be mapped"
                )


def _require_dense(tree: Any) -> None:
    """Raises ValueError where a tensor has parts, which are not filled as its values are."""
    for path, value in trees.leaves(tree):
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise ValueError(f"{trees.named(path)} is of {value.layout}, not torch.strided")


def require_flat(tree: Any, file: Path) -> None:
    """Raises ValueError unless a file of safetensors can have the tree: names of tensors."""
    named = tree.items() if isinstance(tree, Mapping) else [("the tensor", None)]
    for name, value in named:
        if not isinstance(value, Tensor | Placed):
            raise ValueError(
                f"OUT: expected another ending than .safetensors, which has tensors alone, got "
                f"{file}, where {name} would be a {type(value).__name__}"
            )
        if _dtype(value) not in _SAFETENSORS.values():
            raise ValueError(
                f"OUT: expected another ending than .safetensors, which has no {_dtype(value)}, "
                f"got {file}, where {name} has it"
            )


def save(tree: Any, file: Path) -> None:
    """Writes a tree of tensors, :class:`Placed` rows and plain settings, row block by row block."""
    found = {p: v for p, v in trees.leaves(tree) if isinstance(v, Tensor | Placed)}
    if is_safetensors(file):
        _lay_out_safetensors(tree, file)
    else:
        _lay_out(tree, file)
    with open(file, "rb+", buffering=0) as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)  # a map has no error for it
        content = mapped(file, writable=True)
        for path, value in found.items():
            room = trees.at(content, path)
            if isinstance(value, Placed):
                _fill(opened, _offset(room), value)
            else:
                with torch.no_grad():
                    # numbers that an expanded tensor repeats are there once
                    once = tuple(slice(None) if step else slice(1) for step in room.stride())
                    room[once].copy_(value[once])
        if not is_safetensors(file):
            set_checksums(file)
        os.fsync(opened.fileno())


def _lay_out(tree: Any, file: Path) -> None:
    """Writes all but the values of tensors."""
    rows = {path: value for path, value in trees.leaves(tree) if isinstance(value, Placed)}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=file.stem[:50]) as folder:
        for i, (path, value) in enumerate(rows.items()):
            # a file without content stands for the rows: memory of this size need not be there
            size, name = value.shape.numel(), f"{folder}/{i}"
            empty = torch.from_file(name, True, size, dtype=value.rows.dtype)
            tree = trees.replaced(tree, path, empty.view(value.shape))
        with skip_data():
            torch.save(tree, file)


def _fill(opened: IO[bytes], offset: int, placed: Placed) -> None:
    """Writes rows to their place in a file."""
    for start, block in placed.rows.blocks():
        if not placed.transposed:
            width = block[0].numel()
            _write(opened, offset + start * width * block.itemsize, block.contiguous())
            continue
        for i, column in enumerate(block.t().contiguous()):
            at = i * len(placed.rows) + start
            _write(opened, offset + at * block.itemsize, column)


def _write(opened: IO[bytes], offset: int, values: Tensor) -> None:
    rest = bytes_of(values)
    opened.seek(offset)
    while rest:
        rest = rest[opened.write(rest) :]


def _mapped_safetensors(file: Path, writable: bool) -> dict[str, Tensor]:
    """Maps a file of safetensors: the size of a header, the header as JSON, and the tensors."""
    total = file.stat().st_size
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > total - 8:
            raise ValueError(f"a header of {size} bytes in a file of {total}")
        header = json.loads(opened.read(size))
    content = torch.from_file(str(file), writable, total, dtype=torch.uint8)
    data = content[8 + size :]
    return {
        name: data[slice(*entry["data_offsets"])]
        .view(_SAFETENSORS[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _dtype(value: Tensor | Placed) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else value.rows.dtype


def _lay_out_safetensors(tree: Any, file: Path) -> None:
    """Writes the header, and leaves space for the tensors."""
    names = {dtype: name for name, dtype in _SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    # a tensor begins at a multiple of its numbers' size
    for name, value in sorted(tree.items(), key=lambda item: -_dtype(item[1]).itemsize):
        dtype = _dtype(value)
        start, stop = stop, stop + value.shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": names[dtype], "shape": list(value.shape), "data_offsets": [start, stop]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + stop)
