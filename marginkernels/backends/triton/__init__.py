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
# Triton before 3.7.1 has no fence.proxy.async between a cp.async and the wgmma or tcgen05.mma that
# reads what it copied (https://github.com/triton-lang/triton/pull/9610)
FENCED_TRITON = (3, 7, 1)
_FENCED_CAPABILITIES = range(9, 12)  # the major ones that have such instructions
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")


def unavailable_reasons(
    device: torch.device | None = None, compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Every reason why this backend cannot run on this device, or in this type."""
    reasons = []
    version = _triton_version()
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    elif version is not None and version < OLDEST_TRITON:
        reasons.append(f"needs triton >= {_dotted(OLDEST_TRITON)}, found {_dotted(version)}")
    if device is not None and device.type != "cuda":
        reasons.append(f"runs on cuda devices, not on {device.type}")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no GPU")
    elif not torch.version.hip:
        reasons += _capability_obstacles(version, torch.cuda.get_device_capability(device))
    if compute_dtype == torch.float64:
        reasons.append("computes in float32, float16 or bfloat16, not in float64")
    return reasons


def _capability_obstacles(version: tuple[int, ...] | None, has: tuple[int, int]) -> list[str]:
    """Why these kernels cannot run on a GPU of compute capability ``has``."""
    if has < OLDEST_CAPABILITY:
        least = _dotted(OLDEST_CAPABILITY)
        return [f"needs a GPU of compute capability {least}, found {_dotted(has)}"]
    if version == (3, 7, 0) and has[0] == 10:
        return [
            "triton 3.7.0 leaves out a fence (fence.proxy.async) on compute capability "
            f"{_dotted(has)}, where results differed from run to run "
            "(https://github.com/pytorch/pytorch/issues/181248): needs triton >= 3.7.1"
        ]
    return []


def notes() -> list[str]:
    """Lists what a user should know of this backend on the current device."""
    if not torch.cuda.is_available():
        return []
    if torch.version.hip:
        return ["its configurations for AMD GPUs are those for gfx942, and unmeasured"]
    version, has = _triton_version(), torch.cuda.get_device_capability()
    if version is None or version >= FENCED_TRITON or has[0] not in _FENCED_CAPABILITIES:
        return []
    return [
        f"triton {_dotted(version)} leaves out a fence (fence.proxy.async) on compute capability "
        f"{_dotted(has)}; wrong results were seen with 3.7.0 on 10.0 alone, and 3.7.1 mends it"
    ]


@functools.cache
def _triton_version() -> tuple[int, int, int] | None:
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version).groups("0")
        return tuple(map(int, numbers))
    return None


def _dotted(version: tuple[int, ...]) -> str:
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
