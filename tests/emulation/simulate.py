# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the CUDA launchers on the CPU, and executes each launch by a simulator of the kernel's PTX.

The simulated device has every allocation of torch at its own address, so that an access out of
bounds is found.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from tools.gates import nvcc
from tools.ptxsim import Module, Stats
from tools.ptxsim.memory import Alloc

from . import host

_HEAR = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


class Launch(NamedTuple):
    """Holds one launch of a kernel as the launcher asked for it."""

    symbol: str
    grid: int
    block: int
    shared_bytes: int
    arguments: list[bytes]


@contextlib.contextmanager
def _intercepted(hear: Callable[[Launch], bool]) -> Iterator[None]:
    """Calls ``hear(launch)`` before every launch, which returns whether it has executed it."""
    errors: list[BaseException] = []

    def call(
        symbol: bytes, grid: int, block: int, shared_bytes: int, count: int, arguments: Any,
        sizes: Any,
    ) -> bool:  # fmt: skip
        if errors:
            return True
        values = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
        try:
            return hear(Launch(symbol.decode(), grid, block, shared_bytes, values))
        except BaseException as error:  # must not cross into C++
            errors.append(error)
            return True

    library, callback = host.load(), _HEAR(call)
    library.intercept_launches(callback)
    try:
        yield
    finally:
        library.intercept_launches(None)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Yields a list that fills with the launches inside this context; fibers execute them."""
    launches: list[Launch] = []
    with host.executed(), _intercepted(lambda launch: bool(launches.append(launch))):
        yield launches


@functools.cache
def _module(symbols: frozenset[str]) -> Module:
    source = nvcc.instances(nvcc.demangled(sorted(symbols)))
    return Module.from_ptx(nvcc.compile_as("ptx", source, "sm_80"))


def twice(function: Callable[[], Any]) -> tuple[Any, Any, list[tuple[Launch, Stats]]]:
    """Calls ``function`` twice: fibers execute its launches, then the simulator, with every check.

    Returns both results, and the simulator's counters of each launch. The function has to create
    its operands itself.
    """
    if reason := nvcc.why_not():
        pytest.skip(reason)
    with recorded() as launches:
        by_fibers = function()
    module = _module(frozenset(launch.symbol for launch in launches))
    counters: list[tuple[Launch, Stats]] = []

    def run(launch: Launch) -> bool:
        module.device.allocs, module.device.bases = _allocations()
        stats = module.launch(
            launch.symbol, launch.grid, launch.block, launch.arguments, launch.shared_bytes,
            checks="strict",
        )  # fmt: skip
        counters.append((launch, stats))
        return True

    library = host.load()
    with host.executed():
        library.record_allocations(1)
        try:
            with _intercepted(run):
                by_ptx = function()
        finally:
            library.record_allocations(0)
    return by_fibers, by_ptx, counters


def _allocations() -> tuple[list[Alloc], list[int]]:
    """Returns what torch has allocated, and the addresses."""
    library = host.load()
    count = library.allocations(None, None, 0)
    pointers, sizes = (ctypes.c_size_t * count)(), (ctypes.c_size_t * count)()
    library.allocations(pointers, sizes, count)
    found = []
    for pointer, size in sorted(zip(pointers, sizes, strict=True)):
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)
        found.append(Alloc(pointer, memory, f"tensor of {size} bytes", False, None))
    return found, [alloc.base for alloc in found]
