# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps the backends, and selects the one that computes a call.

A backend is a subclass of :class:`Backend` that :func:`register` has been called with; the library
asks it by its methods only. It is one module or folder here, and one line at the end of this file.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch

from .. import ops, row_ops
from . import native, reference, triton
from .base import Backend

# by name, in the order in which backend="auto" prefers them
_registered: dict[str, Backend] = {}
# Up to this N C D, by compute capability, backend="auto" takes native where it would take triton.
# Both have mma.sync on 8.x and 12.0, where native's machine code needs fewer registers and
# instructions per tile, and a launch costs the host less; nothing was timed there. Triton has wgmma
# and tcgen05, native has not. Measured on one H200 (9.0), D = 512, forward and backward in ms,
# native and triton: with fp32 weights (256, 10^5) 0.95 and 2.6, where the host decides, (256, 10^6)
# 5.5 and 4.8, (1024, 10^6) 12.7 and 10.3; with bf16 weights 1.3 and 3.2, 4.2 and 5.2, 11.4 and 8.9.
NATIVE_UP_TO = {
    (8, 0): math.inf,
    (8, 6): math.inf,
    (8, 9): math.inf,
    (9, 0): 1e11,
    (12, 0): math.inf,
}
# what select() found before, by N C D up to which it holds: neither a driver nor a table of
# packages is asked at each step
Selection = tuple[tuple[float, str], ...]
_selected: dict[tuple[str, torch.device, torch.dtype], Selection] = {}
_warned: set[str] = set()  # types of devices
_with_ops: set[str] = set()  # names; an op that is defined stays


def register(backend: Backend) -> None:
    """Adds a backend, and defines its ops.

    Raises:
        ValueError: the name is "auto", or another backend's.
    """
    if backend.name in ("auto", *_registered):
        raise ValueError(
            f"backend: expected a name other than {sorted(('auto', *_registered))}, "
            f"got {backend.name!r}"
        )
    _put(backend)


@contextlib.contextmanager
def registered(backend: Backend) -> Iterator[None]:
    """Has a backend registered inside the context, in place of one of the same name if there is."""
    global _registered
    before = _registered
    _put(backend)
    try:
        yield
    finally:
        _registered = before
        forget_selections()


def _put(backend: Backend) -> None:
    global _registered
    if backend.name not in _with_ops:
        ops.define_head(backend.name, backend.tiles_shape)
        if backend.fuses_rows:
            row_ops.define_rows(backend.name)
        _with_ops.add(backend.name)
        backend.register_kernels()
    backends = {**_registered, backend.name: backend}
    # a new table, because other threads may be reading the one before
    _registered = dict(sorted(backends.items(), key=lambda item: -item[1].priority))
    forget_selections()


def forget_selections() -> None:
    """Makes the next call ask drivers and packages again, and warn again."""
    _selected.clear()
    _warned.clear()


def get(name: str) -> Backend:
    """Returns the backend of this name.

    Raises:
        KeyError: there is none. :func:`check_name` is for the names that users give.
    """
    return _registered[name]


def backend_report() -> dict[str, list[str]]:
    """Lists for each backend every reason why it cannot run here; an empty list means it can."""
    return {name: backend.unavailable_reasons() for name, backend in _registered.items()}


def backend_notes() -> dict[str, list[str]]:
    """Lists for each backend what to know of it on this machine, whether or not it can run here."""
    return {name: backend.notes() for name, backend in _registered.items()}


def reasons(
    backend: str,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Lists every reason why a backend cannot run on this device, or in this type."""
    device = None if device is None else torch.device(device)
    return _registered[backend].unavailable_reasons(device, compute_dtype)


def check_name(backend: str) -> None:
    """Raises ValueError unless it is "auto" or a backend."""
    if backend not in ("auto", *_registered):
        raise ValueError(
            f"backend: expected 'auto' or one of {sorted(_registered)}, got {backend!r}"
        )


def select(
    backend: str, device: torch.device | str, compute_dtype: torch.dtype, work: float = math.inf
) -> str:
    """Returns the backend to use: the named one, never another, or for "auto" the best that runs.

    Args:
        backend: its name, or "auto".
        device: of the embeddings.
        compute_dtype: the type of the arithmetic.
        work: N C D, by which "auto" may choose.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run, with all reasons.
    """
    check_name(backend)
    device = torch.device(device)
    call = backend, device, compute_dtype
    if call not in _selected:
        if backend == "auto":
            _selected[call] = _with_native(_best(device, compute_dtype), device, compute_dtype)
        else:
            _selected[call] = ((math.inf, _named(*call)),)
    return next(name for most, name in _selected[call] if work <= most)


# for torch.compile a constant: torch.compiler.assume_constant_result, which imports the compiler,
# does no more
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _best(device: torch.device, compute_dtype: torch.dtype) -> str:
    """Returns the first that runs, and warns of its caveat once for each type of device."""
    known = _registered
    why_not = {name: known[name].unavailable_reasons(device, compute_dtype) for name in known}
    best = next(name for name, obstacles in why_not.items() if not obstacles)
    caveat = known[best].caveat
    if caveat and compute_dtype != torch.float64 and device.type not in _warned:
        _warned.add(device.type)
        others = ". ".join(f"{name}: {'; '.join(why)}" for name, why in why_not.items() if why)
        warnings.warn(
            f'backend="auto" takes "{best}", {caveat}, on {device.type}. {others}',
            RuntimeWarning,
            stacklevel=2,
        )
    return best


def _with_native(best: str, device: torch.device, compute_dtype: torch.dtype) -> Selection:
    """Returns the best backend, behind native where :data:`NATIVE_UP_TO` prefers that."""
    otherwise = (math.inf, best)
    if best != triton.TritonBackend.name or torch.version.hip:
        return (otherwise,)
    most = NATIVE_UP_TO.get(torch.cuda.get_device_capability(device), 0)
    if most == 0 or reasons(native.NativeBackend.name, device, compute_dtype):
        return (otherwise,)
    return (most, native.NativeBackend.name), otherwise


def _named(backend: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    why_not = reasons(backend, device, compute_dtype)
    if why_not:
        raise RuntimeError(f"backend: {backend!r} cannot run here: " + "; ".join(why_not))
    return backend


register(triton.TritonBackend())
register(native.NativeBackend(native.extension, native.load_failure))
register(reference.ReferenceBackend())
