# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds global memory: exactly tracked allocations in one virtual address space.

An allocation is a byte view of a host array, so kernels change the host array in place. Allocations
are 256-byte aligned and separated by unmapped gaps: an access one byte past the end is an error,
not a neighbour's data.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np

from .ptx_types import ELEM, Array, align_up, u8

WINDOW = 1 << 40
SHARED_WINDOW = 0x7000 << 32
LOCAL_WINDOW = SHARED_WINDOW + WINDOW
PARAM_WINDOW = LOCAL_WINDOW + WINDOW
FIRST_ADDRESS = 0x10_0000_0000
ALIGNMENT = 256
GAP = 4096


class Alloc:
    """Holds one allocation, with views of it and marks of what a launch has touched."""

    def __init__(self, base: int, mem: Array, name: str, readonly: bool, keep: Any) -> None:
        self.base, self.mem, self.name, self.readonly = base, mem, name, readonly
        self.keep = keep  # the host's object, kept alive
        self.nbytes = mem.nbytes
        self.end = base + self.nbytes
        self.views: dict[tuple[int, int], Array] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets what has been touched."""
        self.read: Array | None = None
        self.written: Array | None = None
        self._owner: Array | None = None

    def owners(self) -> Array:
        """Returns for each byte the CTA that stored it last, -1 for none."""
        if self._owner is None:
            self._owner = np.full(self.nbytes, -1, np.int32)
        return self._owner

    def view(self, size: int, shift: int) -> Array:
        """Returns the bytes from `shift` on as elements."""
        if (size, shift) not in self.views:
            n = (self.nbytes - shift) // size * size
            self.views[(size, shift)] = self.mem[shift : shift + n].view(ELEM[size])
        return self.views[(size, shift)]

    def touch(self, index: Array, size: int, shift: int, write: bool) -> None:
        """Marks elements as touched, for the footprint."""
        name = "written" if write else "read"
        marks = getattr(self, name)
        if marks is None:
            marks = np.zeros(self.nbytes + 16, u8)
            setattr(self, name, marks)
        n = (self.nbytes - shift) // size * size
        elements = marks[shift : shift + n].view(ELEM[size])
        elements[index] = np.full(size, 1, u8).view(ELEM[size])[0]

    def __repr__(self) -> str:
        return f"{self.name} [{self.base:#x}, {self.end:#x}) {self.nbytes} bytes"


def host_bytes(obj: Any) -> tuple[Array, int]:
    """Returns the bytes of a numpy array or a torch CPU tensor, and their address modulo 256.

    The bytes are shared with the object.
    """
    if isinstance(obj, np.ndarray):
        if not obj.flags.c_contiguous:
            raise ValueError(
                "numpy arrays must be C-contiguous (pass the base array and an offset)"
            )
        return obj.reshape(-1).view(u8), 0
    import torch

    if not isinstance(obj, torch.Tensor):
        raise TypeError(f"cannot allocate from {type(obj).__name__}")
    if obj.device.type != "cpu":
        raise ValueError("tensors must be on the CPU")
    tensor = obj.detach()
    size = tensor.element_size()
    if tensor.numel() == 0:
        return np.zeros(0, u8), 0
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    span = sum((n - 1) * abs(stride) for n, stride in sides) + 1
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * size
    return raw[start : start + span * size].numpy(), start % ALIGNMENT


class Device:
    """Holds the allocations that kernels may touch."""

    def __init__(self) -> None:
        self.allocs: list[Alloc] = []
        self.bases: list[int] = []
        self._next = FIRST_ADDRESS

    def alloc(
        self, obj: Any, name: str | None = None, readonly: bool = False, residue: int | None = None
    ) -> int:
        """Maps a numpy array or torch CPU tensor; returns its device address.

        `residue` is the address modulo 256, in place of the host's.
        """
        mem, host_residue = host_bytes(obj)
        base = self._next + (host_residue if residue is None else residue)
        alloc = Alloc(base, mem, name or f"alloc{len(self.allocs)}", readonly, obj)
        self.allocs.append(alloc)
        self.bases.append(base)
        self._next = align_up(base + alloc.nbytes + GAP, ALIGNMENT)
        return base

    def empty(self, nbytes: int, name: str | None = None, fill: int = 0xFF) -> int:
        """Allocates bytes with a fill pattern; 0xFF reads as NaN in every float format."""
        return self.alloc(np.full(nbytes, fill, u8), name)

    def find(self, address: int) -> Alloc | None:
        """Returns the allocation that an address lies in."""
        i = bisect.bisect_right(self.bases, address) - 1
        if i >= 0 and address < self.allocs[i].end:
            return self.allocs[i]
        return None

    def near(self, address: int) -> str:
        """Describes where an address lies, for error messages."""
        i = bisect.bisect_right(self.bases, address) - 1
        if i < 0:
            return "below every allocation"
        alloc = self.allocs[i]
        if address < alloc.end:
            return f"{address - alloc.base} bytes into {alloc}"
        return f"{address - alloc.end} bytes past the end of {alloc}"

    def get(self, address: int) -> Alloc:
        """Returns the allocation that an address lies in; there has to be one."""
        alloc = self.find(address)
        if alloc is None:
            raise KeyError(f"{address:#x} is not inside an allocation")
        return alloc

    def read(self, address: int, dtype: Any, count: int) -> Array:
        """Copies `count` elements out."""
        alloc = self.get(address)
        start = address - alloc.base
        n = np.dtype(dtype).itemsize * count
        if start + n > alloc.nbytes:
            raise ValueError("read past the end of the allocation")
        return alloc.mem[start : start + n].copy().view(dtype)

    def write(self, address: int, array: Array) -> None:
        """Copies an array in."""
        raw = np.ascontiguousarray(array).reshape(-1).view(u8)
        alloc = self.get(address)
        start = address - alloc.base
        if start + len(raw) > alloc.nbytes:
            raise ValueError("write past the end of the allocation")
        alloc.mem[start : start + len(raw)] = raw

    def free(self, address: int) -> None:
        """Ends the allocation that starts at an address."""
        i = self.bases.index(address)
        del self.bases[i], self.allocs[i]

    def reset_footprint(self) -> None:
        """Forgets what has been touched."""
        for alloc in self.allocs:
            alloc.reset()
