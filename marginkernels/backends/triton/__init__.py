# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The ops in Triton, for CUDA and ROCm devices. Triton itself is imported at the first call.

With MARGINKERNELS_AUTOTUNE=1 the first call of a class of shapes times the configurations that fit.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re

import torch

from ... import ops

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")


def unavailable_reasons(
    device_type: str | None = None, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Every reason why this backend cannot run on this device, or in this type."""
    reasons = []
    version = _triton_version()
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    elif version is not None and version < OLDEST_TRITON:
        reasons.append(f"needs triton >= {_dotted(OLDEST_TRITON)}, found {_dotted(version)}")
    if device_type not in (None, "cuda"):
        reasons.append(f"runs on cuda devices, not on {device_type}")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no GPU")
    elif not torch.version.hip and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = _dotted(torch.cuda.get_device_capability())
        reasons.append(
            f"needs a GPU of compute capability {_dotted(OLDEST_CAPABILITY)}, found {found}"
        )
    if compute_dtype == torch.float64:
        reasons.append("computes in float32, float16 or bfloat16, not in float64")
    return reasons


@functools.cache
def _triton_version() -> tuple[int, int] | None:
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
        return int(major), int(minor)
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _on_device(name: str):
    def call(x, *args, **settings):
        from . import launch, tuning

        op = getattr(launch, name)
        # kernels go to the current device; an autocast around the call must not narrow the GEMMs
        with torch.cuda.device(x.device), torch.autocast("cuda", enabled=False):
            if os.environ.get("MARGINKERNELS_AUTOTUNE") == "1":
                settings["config"] = tuning.fastest(op, x, *args, **settings)
            return op(x, *args, **settings)

    return call


ops.LIBRARY.impl("head_fwd_triton", _on_device("head_fwd"), "CUDA")
ops.LIBRARY.impl("head_bwd_triton", _on_device("head_bwd"), "CUDA")
