# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Who computes: each module here registers the two ops and says when it cannot run."""

import torch

from . import native, reference, triton

# in the order in which backend="auto" prefers them
_MODULES = {"triton": triton, "native": native, "reference": reference}


def backend_report() -> dict[str, list[str]]:
    """For each backend every reason why it cannot run here; an empty list means that it can."""
    return {backend: reasons(backend) for backend in _MODULES}


def reasons(
    backend: str, device_type: str | None = None, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Every reason why a backend cannot run on this device, or in this type."""
    return _MODULES[backend].unavailable_reasons(device_type, compute_dtype)


def check_name(backend: str) -> None:
    """Raises ValueError unless it is "auto" or a backend."""
    if backend != "auto" and backend not in _MODULES:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(_MODULES)}, got {backend!r}")


@torch.compiler.assume_constant_result
def select(backend: str, device_type: str, compute_dtype: torch.dtype) -> str:
    """The backend to use: the one that is named, never another, or for "auto" the best that runs.

    Raises ValueError for an unknown name, RuntimeError with all reasons for one that cannot run.
    """
    if backend == "auto":
        return next(name for name in _MODULES if not reasons(name, device_type, compute_dtype))
    check_name(backend)
    why_not = reasons(backend, device_type, compute_dtype)
    if why_not:
        raise RuntimeError(f"backend: {backend!r} cannot run here: " + "; ".join(why_not))
    return backend
