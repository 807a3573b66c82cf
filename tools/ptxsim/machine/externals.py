# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The functions that the driver provides: printf and assert."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceAssertError
from ..memory import LOCAL_WINDOW
from ..ptx_types import Array, align_up, f64, i32, i64, u32, u64

if TYPE_CHECKING:
    from ..syntax.elements import Instr
    from .state import State

CONVERSION = re.compile(r"%([-+ #0-9.lhz]*)([a-zA-Z%])")


def string_at(state: State, address: int) -> str:
    """Reads a C string from global memory."""
    alloc = state.device.find(address)
    if alloc is None:
        return "?"
    raw = alloc.mem[address - alloc.base :].tobytes()
    return raw.split(b"\0")[0].decode(errors="replace")


def formatted(state: State, text: str, memory: Array, position: int) -> str:
    """Formats as printf does, with the arguments that lie in `memory` from `position` on."""

    def argument(match: re.Match) -> str:
        nonlocal position
        spec, kind = match.group(0), match.group(2)
        if kind == "%":
            return "%"
        wide = kind in "feEgGsp" or "l" in spec or "z" in spec
        size = 8 if wide else 4
        position = align_up(position, size)
        raw = memory[position : position + size].copy()
        position += size
        if kind in "feEgG":
            return spec % float(raw.view(f64)[0])
        value = int(raw.view(u64 if wide else u32)[0])
        if kind == "s":
            return string_at(state, value)
        if kind == "p":
            return hex(value)
        if kind in "di":
            value = int(raw.view(i64 if wide else i32)[0])
        if kind == "c":
            return chr(value & 255)
        return re.sub("[lhz]", "", spec).replace("u", "d").replace("i", "d") % value

    return CONVERSION.sub(argument, text)


def vprintf(state: State, ins: Instr, arguments: list[int], results: list[int]) -> None:
    """Prints a line for each active lane into the statistics."""
    formats, addresses = (state.buffers[b].view(u64).reshape(-1) for b in arguments)
    for lane in state.lanes():
        text = string_at(state, int(formats[lane]))
        position, memory = int(addresses[lane]), np.zeros(0, np.uint8)
        if position >= LOCAL_WINDOW:
            memory = state.local[lane * state.local_size : (lane + 1) * state.local_size]
            position -= LOCAL_WINDOW
        state.stats.printed.append(formatted(state, text, memory, position))
    state.buffers[results[0]][:] = 0


def assertfail(state: State, ins: Instr, arguments: list[int], results: list[int]) -> None:
    """Raises the error of a failed device-side assertion."""
    lane = 0 if state.mask is None else int(state.active_lanes()[0])
    buffers = [state.buffers[b] for b in arguments]
    values = [b.view(u64 if b.shape[1] == 8 else u32).reshape(-1)[lane] for b in buffers]
    message, file, line, function = (int(v) for v in values[:4])
    state.fault(
        DeviceAssertError,
        f"device assertion failed: {string_at(state, message)} "
        f"({string_at(state, file)}:{line}, {string_at(state, function)})",
        ins,
        None,
        lane,
    )


EXTERNALS: dict[str, Callable[..., None]] = {"vprintf": vprintf, "__assertfail": assertfail}
