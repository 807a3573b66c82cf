# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Sets the checksums in a file of ``torch.save`` whose tensors were written after the rest."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from .rows import BLOCK

# bytes before the names: in an entry of the directory, and before the data of an entry
_IN_DIRECTORY, _BEFORE_DATA = 46, 30
_HAS_SUM_BEHIND = 8  # the flag of an entry whose checksum follows its data


def set_checksums(file: Path) -> None:
    """Computes the CRC-32 of each tensor, and writes it behind the data and into the directory."""
    with zipfile.ZipFile(file) as archive:
        entries, position = archive.infolist(), archive.start_dir
    with open(file, "rb+") as opened:
        for entry in entries:
            names = _two_bytes(opened, entry.header_offset + 26, 2)
            data = entry.header_offset + _BEFORE_DATA + sum(names)
            total = struct.pack("<I", _crc32(opened, data, entry.file_size))
            if entry.flag_bits & _HAS_SUM_BEHIND:
                _write(opened, data + entry.file_size + 4, total)
            _write(opened, position + 16, total)
            position += _IN_DIRECTORY + sum(_two_bytes(opened, position + 28, 3))


def _two_bytes(opened: IO[bytes], position: int, count: int) -> tuple[int, ...]:
    """Reads numbers of two bytes each."""
    opened.seek(position)
    return struct.unpack(f"<{count}H", opened.read(2 * count))


def _crc32(opened: IO[bytes], position: int, size: int) -> int:
    opened.seek(position)
    total = 0
    while size:
        block = opened.read(min(size, BLOCK))
        total, size = zlib.crc32(block, total), size - len(block)
    return total


def _write(opened: IO[bytes], position: int, content: bytes) -> None:
    opened.seek(position)
    opened.write(content)
