# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads tensors with a row per class, or per centre, block by block: nothing is held as a whole."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# bytes of a block
BLOCK = 16 << 20


class Rows:
    """Stands for a tensor (N, ...) whose rows are read when they are needed."""

    shape: torch.Size
    dtype: torch.dtype

    def read(self, index: Tensor) -> Tensor:
        """Returns the rows with these numbers, (len(index), ...), as a new tensor."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize

    def starts(self) -> list[int]:
        """Returns the numbers of the first rows of the blocks, and the number of rows."""
        n = len(self)
        step = max(1, BLOCK * n // max(1, self.nbytes))
        return [*range(0, n, step), n]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the number of the first row of each block, and the block."""
        starts = self.starts()
        for start, stop in itertools.pairwise(starts):
            yield start, self.read(torch.arange(start, stop))


class Joined(Rows):
    """Joins the rows of several parts, one after another."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.dtype = parts[0].dtype
        sizes = torch.tensor([len(part) for part in parts])
        self._stops = sizes.cumsum(0)
        self._firsts = self._stops - sizes
        self.shape = torch.Size([int(self._stops[-1]), *parts[0].shape[1:]])

    def read(self, index: Tensor) -> Tensor:
        part_of = torch.bucketize(index, self._stops, right=True)
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for i in part_of.unique().tolist():
            here = part_of == i
            rows[here] = self.parts[i].read(index[here] - self._firsts[i])
        return rows


class Part(Rows):
    """Takes the rows from start to stop."""

    def __init__(self, rows: Rows, start: int, stop: int):
        self.rows, self.start = rows, start
        self.shape, self.dtype = torch.Size([stop - start, *rows.shape[1:]]), rows.dtype

    def read(self, index: Tensor) -> Tensor:
        return self.rows.read(index + self.start)


class Grouped(Rows):
    """Makes each row of one old row or of several.

    Args:
        new_row: (N,), the new number of each old row, -1 where it is left out. Each number from 0
            to the greatest occurs.
        directions: whether several rows give the mean of their directions with the mean of their
            norms, which is for class weights; else they give their mean.
    """

    def __init__(self, rows: Rows, new_row: Tensor, directions: bool):
        self.rows, self.directions = rows, directions
        # the old rows in the order of the new ones
        self._old = new_row.argsort(stable=True)[(new_row < 0).sum() :]
        self._count = torch.bincount(new_row[new_row >= 0])
        self._first = self._count.cumsum(0) - self._count
        self.shape = torch.Size([len(self._count), *rows.shape[1:]])
        self.dtype = rows.dtype

    def read(self, index: Tensor) -> Tensor:
        count = self._count[index]
        if (count == 1).all():
            return self.rows.read(self._old[self._first[index]])
        group = torch.repeat_interleave(torch.arange(len(index)), count)
        within = torch.arange(len(group)) - (count.cumsum(0) - count)[group]
        rows = self.rows.read(self._old[self._first[index][group] + within])
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        merged = (
            _direction_means(wide, group, count) if self.directions else _means(wide, group, count)
        )
        merged = merged.to(self.dtype)
        single = count[group] == 1  # as they are, to the last bit
        merged[group[single]] = rows[single]
        return merged


def _means(rows: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Returns the mean of the rows of each group."""
    sums = rows.new_zeros(len(count), *rows.shape[1:]).index_add_(0, group, rows)
    return sums / count.reshape(-1, *[1] * (rows.ndim - 1))


def _direction_means(rows: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Returns the mean direction of the rows of each group, with their mean norm."""
    norm = rows.norm(dim=1, keepdim=True)
    tiny = torch.finfo(rows.dtype).tiny
    mean = _means(rows / norm.clamp_min(tiny), group, count)
    return mean / mean.norm(dim=1, keepdim=True).clamp_min(tiny) * _means(norm, group, count)
