# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Who computes: each module here registers the two ops and says when it cannot run."""

import warnings

import torch

from . import native, reference, triton

# in the order in which backend="auto" prefers them
_MODULES = {"triton": triton, "native": native, "reference": reference}

# what select() found before: neither a driver nor a table of packages is asked at each step
_selected: dict[tuple[str, torch.device, torch.dtype], str] = {}
_warned: set[str] = set()  # types of devices


def backend_report() -> dict[str, list[str]]:
    """For each backend every reason why it cannot run here; an empty list means that it can."""
    return {backend: reasons(backend) for backend in _MODULES}


def backend_notes() -> dict[str, list[str]]:
    """For each backend what to know of it on this machine, whether or not it can run here."""
    return {"triton": triton.notes()}


def reasons(
    backend: str,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Every reason why a backend cannot run on this device, or in this type."""
    device = None if device is None else torch.device(device)
    return _MODULES[backend].unavailable_reasons(device, compute_dtype)


def check_name(backend: str) -> None:
    """Raises ValueError unless it is "auto" or a backend."""
    if backend not in ("auto", *_MODULES):
        raise ValueError(f"backend: expected 'auto' or one of {sorted(_MODULES)}, got {backend!r}")


def select(backend: str, device: torch.device | str, compute_dtype: torch.dtype) -> str:
    """The backend to use: the one that is named, never another, or for "auto" the best that runs.

    Raises ValueError for an unknown name, RuntimeError with all reasons for one that cannot run.
    """
    check_name(backend)
    device = torch.device(device)
    call = backend, device, compute_dtype
    if call not in _selected:
        _selected[call] = _best(*call[1:]) if backend == "auto" else _named(*call)
    return _selected[call]


# for torch.compile a constant: torch.compiler.assume_constant_result, which imports the compiler,
# does no more
select._dynamo_marked_constant = True


def _best(device: torch.device, compute_dtype: torch.dtype) -> str:
    """The first that runs; one warning for a type of device if that is none of the fast ones."""
    why_not = {name: reasons(name, device, compute_dtype) for name in _MODULES}
    best = next(name for name, obstacles in why_not.items() if not obstacles)
    if best == "reference" and compute_dtype != torch.float64 and device.type not in _warned:
        _warned.add(device.type)
        others = ". ".join(f"{name}: {'; '.join(why)}" for name, why in why_not.items() if why)
        warnings.warn(
            f'backend="auto" takes "reference", plain PyTorch, on {device.type}. {others}',
            RuntimeWarning,
            stacklevel=2,
        )
    return best


def _named(backend: str, device: torch.device, compute_dtype: torch.dtype) -> str:
    why_not = reasons(backend, device, compute_dtype)
    if why_not:
        raise RuntimeError(f"backend: {backend!r} cannot run here: " + "; ".join(why_not))
    return backend
