# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names, publishes and checks the directories and files of checkpoints."""

import contextlib
import errno
import itertools
import json
import operator
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

SUMS = "checksums"
# bytes per checksum
BLOCK = 4 << 20


def new_folder(path: Path) -> str:
    """Makes a directory for the files of a save to ``path``, beside it, and returns its name."""
    if path.name == "..":  # pathlib has names for "." and "/" too, which exist
        raise ValueError(f"path: expected the name of a new directory, got {path}")
    try:
        if _exists(path):
            raise FileExistsError(f"path: expected a new directory, got {path}, which exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of full length leaves no room for an ending
        partial = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.partial")
        partial.mkdir()
    except OSError as error:
        if error.errno is None:
            raise
        raise ValueError(f"path: expected a new directory, got {path}: {error.strerror}") from error
    return partial.name


def publish(partial: Path, path: Path, sums: dict[str, list[int]]) -> None:
    """Adds the checksums and renames the directory.

    Raises:
        FileExistsError: another save was first.
    """
    text = json.dumps({"block": BLOCK, "files": sums}).encode()
    with open(partial / SUMS, "wb") as file:
        file.write(b"%08x\n" % zlib.crc32(text) + text)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    taken = FileExistsError(f"path: expected a new directory, got {path}, which exists by now")
    if _exists(path):
        raise taken
    try:
        partial.rename(path)  # fails where there is anything but an empty directory
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise taken from error
        raise
    _sync(path.parent)


def remove(partial: Path) -> None:
    """Removes what a failed save has written."""
    shutil.rmtree(partial, ignore_errors=True)


def _exists(path: Path) -> bool:
    """Returns whether there is anything, a link to nothing included.

    Raises:
        OSError: the name is impossible.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _sync(folder: Path) -> None:
    """Makes the names in a directory survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer(FileSystemWriter):
    """Takes the checksums of the bytes on their way to the files."""

    fs: "_SummingFiles"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _SummingFiles()

    @property
    def sums(self) -> dict[str, list[int]]:
        """Returns the CRC-32 of each block of each file that this process has written."""
        return self.fs.sums


class _SummingFiles(FileSystem):
    """Keeps the checksums of the files that it writes, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = _SummedStream(stream)
            yield summed
        self.sums[Path(path).name] = summed.sums

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _SummedStream:
    """Passes bytes on to a stream, with a CRC-32 of each block of :data:`BLOCK` bytes."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._size = 0
        self.sums: list[int] = []

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while rest:
            space = BLOCK - self._size % BLOCK
            if space == BLOCK:
                self.sums.append(0)
            self.sums[-1] = zlib.crc32(rest[:space], self.sums[-1])
            self._size += len(rest[:space])
            rest = rest[space:]
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def read_sums(folder: Path) -> dict[str, list[int]] | None:
    """Reads the checksums of a checkpoint's files, and returns None where there are none."""
    try:
        first, _, text = (folder / SUMS).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if first != b"%08x" % zlib.crc32(text):
        raise ValueError(f"{folder / SUMS}: not as saved: its checksum differs")
    content = json.loads(text)
    if content["block"] != BLOCK:
        raise ValueError(f"{folder / SUMS}: expected blocks of {BLOCK}, got {content['block']}")
    return content["files"]


def check_blocks(
    folder: Path, sums: dict[str, list[int]], blocks: Iterable[tuple[str, int]]
) -> None:
    """Raises ValueError where the bytes of a block have changed.

    Args:
        blocks: the file of each block and its number there, file after file.
    """
    for name, numbered in itertools.groupby(blocks, key=operator.itemgetter(0)):
        with _opened(folder / name) as file:
            for _, number in numbered:
                expected = sums.get(name, [])[number : number + 1]
                if [_block_sum(file, number)] != expected:
                    raise ValueError(
                        f"{folder / name}: not as saved: the checksum of the bytes from "
                        f"{number * BLOCK} on differs"
                    )


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the file is missing") from error


def _block_sum(file: IO[bytes], number: int) -> int:
    file.seek(number * BLOCK)
    return zlib.crc32(file.read(BLOCK))
