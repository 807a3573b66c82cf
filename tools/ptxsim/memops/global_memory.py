# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Accesses global memory: checks bounds, counts sectors, notes footprints, finds overlaps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compiling import Instr, State
from ..errors import MisalignedError, OutOfBoundsError, RaceError, ReadOnlyError
from ..memory import Alloc
from ..ptx_types import ELEM, LOG2, Array, i64, u8, u64

NO_SECTOR = u64(0xFFFFFFFFFFFFFFFF)


class Piece(NamedTuple):
    """Describes the part of an access that falls into one allocation."""

    selected: Array | None  # positions among the active lanes; None for all
    alloc: Alloc
    elements: Array  # indices of elements of the access size, counted from `shift`
    shift: int


def locate_global(state: State, ins: Instr, a: Array, size: int, write: bool) -> list[Piece]:
    """Checks an access of the active lanes and returns where it goes."""
    if size > 1:
        bad = a & u64(size - 1)
        if bad.any():
            k = int(np.argmax(bad != 0))
            at = int(a[k])
            message = f"global access of {size} bytes at {at:#x} ({state.device.near(at)})"
            state.fault(MisalignedError, message, ins, state.lanes_or_none(), k)
    low, high = int(a.min()), int(a.max())
    alloc = state.device.find(low)
    if alloc is not None and high + size <= alloc.end:
        return [_piece(state, ins, None, alloc, a, size, write)]
    pieces = []
    which = np.searchsorted(np.array(state.device.bases, u64), a, "right") - 1
    for w in np.unique(which):
        selected = np.flatnonzero(which == w)
        alloc = state.device.allocs[w] if w >= 0 else None
        inside = a[selected]
        bad = np.ones(len(inside), bool) if alloc is None else inside + u64(size) > u64(alloc.end)
        if bad.any():
            k = int(selected[np.argmax(bad)])
            at = int(a[k])
            message = (
                f"global {'write' if write else 'read'} of {size} bytes at {at:#x}: "
                f"{state.device.near(at)}"
            )
            state.fault(OutOfBoundsError, message, ins, state.lanes_or_none(), k, address=at)
        pieces.append(_piece(state, ins, selected, alloc, inside, size, write))
    return pieces


def _piece(
    state: State,
    ins: Instr,
    selected: Array | None,
    alloc: Alloc,
    a: Array,
    size: int,
    write: bool,
) -> Piece:
    if write and alloc.readonly:
        first = 0 if selected is None else int(selected[0])
        message = f"write to read-only {alloc}"
        state.fault(ReadOnlyError, message, ins, state.lanes_or_none(), first)
    shift = -alloc.base % size
    index = (a - u64(alloc.base + shift)) >> u64(LOG2[size])
    return Piece(selected, alloc, index.view(i64), shift)


def count_sectors(state: State, a: Array) -> tuple[int, int]:
    """Returns requests and distinct sectors over the warps of the active lanes."""
    sectors = a >> u64(5)
    if state.mask is not None:
        active_sectors = sectors
        sectors = np.full(state.n_lanes, NO_SECTOR)
        sectors[state.active_lanes()] = active_sectors
    rows = np.sort(sectors.reshape(-1, 32), axis=1)
    requests = int((rows[:, 0] != NO_SECTOR).sum())
    further = (rows[:, 1:] != rows[:, :-1]) & (rows[:, 1:] != NO_SECTOR)
    return requests, int(further.sum()) + requests


def note_global(state: State, a: Array, size: int, kind: str, pieces: list[Piece]) -> None:
    """Counts an access: a load, store or atomic."""
    stats = state.stats
    requests, sectors = count_sectors(state, a)
    if kind == "load":
        stats.note_load(len(a) * size, requests, sectors)
    elif kind == "store":
        stats.note_store(len(a) * size, requests, sectors)
    else:
        stats.global_atomic_bytes += len(a) * size
        stats.global_atomic_sectors += sectors
    for piece in pieces:
        if kind != "store":
            piece.alloc.touch(piece.elements, size, piece.shift, False)
        if kind != "load":
            piece.alloc.touch(piece.elements, size, piece.shift, True)


def as_u64(a: Array) -> Array:
    """Returns addresses as 64-bit words."""
    return a if a.dtype == u64 else a.astype(u64)


def global_load(state: State, ins: Instr, a: Array, size: int) -> Array:
    """Loads one element for each active lane."""
    a = as_u64(a)
    pieces = locate_global(state, ins, a, size, False)
    if state.want_stats:
        note_global(state, a, size, "load", pieces)
    if pieces[0].selected is None:
        _, alloc, index, shift = pieces[0]
        return alloc.view(size, shift)[index]
    out = np.empty(len(a), ELEM[size])
    for selected, alloc, index, shift in pieces:
        out[selected] = alloc.view(size, shift)[index]
    return out


def global_store(state: State, ins: Instr, a: Array, size: int, values: Array) -> None:
    """Stores one element for each active lane."""
    a = as_u64(a)
    pieces = locate_global(state, ins, a, size, True)
    if state.want_stats:
        note_global(state, a, size, "store", pieces)
    for piece in pieces:
        own = values if piece.selected is None else values[piece.selected]
        if state.checks.global_overlap:
            check_overlap(state, ins, piece, size, own)
        piece.alloc.view(size, piece.shift)[piece.elements] = own


def check_overlap(state: State, ins: Instr, piece: Piece, size: int, values: Array) -> None:
    """Finds plain stores to bytes where another CTA of this launch stored another value."""
    selected, alloc, index, shift = piece
    cta = state.cta0 + state.lane_cta[state.lanes()]
    cta = (cta if selected is None else cta[selected]).astype(np.int32)
    owner = alloc.owners()
    at = (index * size + shift)[:, None] + np.arange(size)
    new = np.ascontiguousarray(values).view(u8).reshape(-1, size)
    previous = owner[at]
    differs = alloc.mem[at] != new
    bad = ((previous >= 0) & (previous != cta[:, None]) & differs).any(1)
    owner[at] = cta[:, None]
    if (owner[at] != cta[:, None]).any():  # another CTA in this same step
        order = np.argsort(index, kind="stable")
        si, sb = index[order], new[order]
        bad[order[1:][(si[1:] == si[:-1]) & (sb[1:] != sb[:-1]).any(1)]] = True
    if bad.any():
        k = int(np.argmax(bad))
        gx, gy, _ = state.launch.grid
        p = int(previous[k].max())
        who = "another CTA in the same step"
        if p >= 0:
            who = f"CTA {(p % gx, p // gx % gy, p // (gx * gy))}"
        first = alloc.base + int(at[k, 0])
        message = (
            f"global store of {size} bytes at {first:#x} ({state.device.near(first)}): "
            f"{who} stored a different value there"
        )
        lane = k if selected is None else int(selected[k])
        state.fault(RaceError, message, ins, state.lanes_or_none(), lane)
