# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads tables of classes and counts of centres, and makes new numbers of rows of them."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .files import mapped

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def with_classes(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Drops, merges and renumbers classes as a table says, and adds a note."""
    k, c = checkpoint.sub_centers, checkpoint.num_classes
    new = _new_classes(file, c)
    counts = torch.bincount(new[new >= 0])
    merged = int((counts > 1).sum())
    if merged and k > 1:
        raise ValueError(
            f"{file}: expected no classes that merge while they have {k} centres each, whose order "
            f"means nothing, got {merged}; --reduce makes one centre of them first"
        )
    centers = torch.where(new[:, None] < 0, -1, new[:, None] * k + torch.arange(k)).flatten()
    checkpoint = checkpoint.regrouped(centers, new, k)
    dropped = int((new < 0).sum())
    checkpoint.notes.append(
        f"classes: {c:,} -> {len(counts):,} by {file}: {dropped:,} dropped, "
        f"{c - dropped - len(counts) + merged:,} merged into {merged:,}"
        if merged
        else f"classes: {c:,} -> {len(counts):,} by {file}: {dropped:,} dropped, none merged"
    )
    return checkpoint


def with_one_center(checkpoint: Checkpoint, how: str) -> Checkpoint:
    """Leaves one centre of each class: their mean, or the one with the greatest count.

    Args:
        how: ``"mean"``, or a file of counts (C, K).
    """
    k, c = checkpoint.sub_centers, checkpoint.num_classes
    if k == 1:
        raise ValueError("--reduce: expected several centres, got --sub-centers 1")
    new_class = torch.arange(c)
    if how == "mean":
        new = new_class.repeat_interleave(k)
        note = "the mean direction of each class, with the mean norm"
    else:
        counts = _table(Path(how))
        if counts.shape != (c, k):
            raise ValueError(f"{how}: expected counts {(c, k)}, got {tuple(counts.shape)}")
        new = torch.where(torch.arange(k) == counts.argmax(1)[:, None], new_class[:, None], -1)
        note = f"the one with the greatest count in {how}"
    checkpoint = checkpoint.regrouped(new.flatten(), new_class, 1)
    checkpoint.notes.append(f"centres: {k} -> 1, {note}")
    return checkpoint


def _new_classes(file: Path, num_classes: int) -> Tensor:
    """Reads the new number of each old class, -1 where it is dropped."""
    table = _table(file)
    if table.ndim == 2 and table.shape[1] == 2:
        old, new = table.unbind(1)
        if not torch.equal(old.sort().values, torch.arange(num_classes)):
            raise ValueError(
                f"{file}: expected each old class from 0 to {num_classes - 1} once, got "
                f"{len(old)} lines{_first_odd(old, num_classes)}"
            )
        table = torch.empty_like(new)
        table[old] = new
    if table.shape != (num_classes,):
        raise ValueError(
            f"{file}: expected a new class for each of {num_classes} old ones, got "
            f"{tuple(table.shape)}"
        )
    if (table < -1).any():
        raise ValueError(f"{file}: expected new classes from 0 on or -1, got {int(table.min())}")
    present = table[table >= 0].unique()
    if not len(present):
        raise ValueError(f"{file}: expected a class that is not dropped, got none")
    gaps = torch.nonzero(present != torch.arange(len(present)))
    if len(gaps):
        raise ValueError(
            f"{file}: expected an old class for each new one from 0 to {int(present[-1])}, got "
            f"none for {int(gaps[0])}"
        )
    return table


def _first_odd(old: Tensor, num_classes: int) -> str:
    """Names a class that is out of range, twice there, or missing."""
    outside = old[(old < 0) | (old >= num_classes)]
    if len(outside):
        return f", with class {int(outside[0])}"
    counts = torch.bincount(old, minlength=num_classes)
    wrong = int((counts != 1).nonzero()[0])
    return f", with class {wrong} {int(counts[wrong])} times"


def _table(file: Path) -> Tensor:
    """Reads integers from .npy, .pt, or lines with one or more numbers each."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix == ".npy":
        return _array(file)
    if file.suffix in (".pt", ".pth"):
        loaded = mapped(file)
        if not isinstance(loaded, Tensor):
            raise ValueError(f"{file}: expected a tensor of integers, got {type(loaded).__name__}")
        if loaded.dtype not in _INTEGERS:
            raise _no_integers(file, loaded.dtype)
        return loaded.long()
    try:
        return _numbers(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected lines of integers: {error}") from error


def _array(file: Path) -> Tensor:
    """Reads integers from .npy."""
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected an array in .npy: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file}: expected an array, got {type(array).__name__}")
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise _no_integers(file, array.dtype)
    return torch.from_numpy(array.astype("int64"))


def _no_integers(file: Path, dtype: object) -> ValueError:
    """Makes the error for a table of numbers that are no classes, such as a mask."""
    text = f"{file}: expected integers of up to 64 bits with a sign, got {dtype}"
    if str(dtype).endswith("bool"):
        text += "; a mask of classes to keep makes the table where(keep, keep.cumsum(0) - 1, -1)"
    return ValueError(text)


def _numbers(file: Path) -> Tensor:
    """Reads lines of numbers with commas, tabs or spaces between; the first may be a heading."""
    rows: list[list[int]] = []
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            words = line.replace(",", " ").split()
            try:
                row = [int(word) for word in words]
            except ValueError as error:
                if number == 1:
                    continue
                raise ValueError(
                    f"{file}:{number}: expected integers, got {line.strip()}"
                ) from error
            if row and rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{file}:{number}: expected {len(rows[0])} numbers as in the lines before, got "
                    f"{line.strip()}"
                )
            if row:
                rows.append(row)
    try:
        table = torch.tensor(rows, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: expected integers of 64 bits: {error}") from error
    return table[:, 0] if table.ndim == 2 and table.shape[1] == 1 else table
