# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The CUDA backend's launchers on the CPU, each launch executed by a simulator of the PTX that nvcc
makes of the kernel.

Every allocation of torch is mapped into the simulated device at its own address, so that an access
out of its bounds is found.
"""

import contextlib
import ctypes
import functools
from typing import NamedTuple

import numpy as np
import pytest

from . import host, nvcc

_INTERCEPT = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


class Launch(NamedTuple):
    symbol: str
    grid: int
    block: int
    shared_bytes: int
    arguments: list[bytes]


@contextlib.contextmanager
def intercepted(take):
    """``take(launch)`` instead of every launch inside this context, which raises its errors."""
    errors = []

    def call(symbol, grid, block, shared_bytes, count, arguments, sizes):
        if errors:
            return
        values = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
        try:
            take(Launch(symbol.decode(), grid, block, shared_bytes, values))
        except BaseException as error:  # must not cross into C++
            errors.append(error)

    library, callback = host.load(), _INTERCEPT(call)
    library.intercept_launches(callback)
    try:
        yield
    finally:
        library.intercept_launches(None)
        if errors:
            raise errors[0]


@functools.cache
def _module(symbol: str):
    from ptxsim import Module

    (name,) = nvcc.demangled([symbol])
    return Module.from_ptx(nvcc.compile_as("ptx", nvcc.instances([name]), "sm_80").decode())


def why_not() -> str | None:
    return host.why_not() or nvcc.why_not()


@contextlib.contextmanager
def simulated(on_result=lambda launch, stats: None):
    """``backend="cuda_host"`` runs as PTX inside this context, with every check on."""
    pytest.importorskip("ptxsim", reason="the package ptxsim is not installed")
    if reason := why_not():
        pytest.skip(reason)

    def run(launch: Launch) -> None:
        module = _module(launch.symbol)
        module.device.allocs, module.device.bases = _allocations()
        stats = module.launch(
            launch.symbol, launch.grid, launch.block, launch.arguments, launch.shared_bytes,
            checks="strict",
        )  # fmt: skip
        on_result(launch, stats)

    library = host.load()
    with host.executed():
        library.record_allocations(1)
        try:
            with intercepted(run):
                yield
        finally:
            library.record_allocations(0)


def _allocations():
    """What torch has allocated, at the addresses that it has."""
    from ptxsim.memory import Alloc

    library = host.load()
    count = library.allocations(None, None, 0)
    pointers, sizes = (ctypes.c_size_t * count)(), (ctypes.c_size_t * count)()
    library.allocations(pointers, sizes, count)
    found = []
    for pointer, size in sorted(zip(pointers, sizes, strict=True)):
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)
        found.append(Alloc(pointer, memory, f"tensor of {size} bytes", False, None))
    return found, [alloc.base for alloc in found]
