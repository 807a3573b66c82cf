# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the ops in Triton, on CUDA and ROCm devices.

Triton itself is imported at the first call.

With MARGINKERNELS_AUTOTUNE=1 the first call of a class of shapes times the configurations that fit.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import ops, row_ops
from ..base import Backend
from . import configs

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
AMD = "gfx942"  # the only architecture of AMD that the kernels were compiled for, and judged
# Triton before 3.7.1 has no fence.proxy.async between a cp.async and the wgmma or tcgen05.mma that
# reads what it copied (https://github.com/triton-lang/triton/pull/9610)
FENCED_TRITON = (3, 7, 1)
_FENCED_CAPABILITIES = range(9, 12)  # the major ones that have such instructions
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")


class TritonBackend(Backend):
    """Runs the kernels of this folder on GPUs."""

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = 30
    updates: ClassVar[bool] = True
    fuses_rows: ClassVar[bool] = True

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Lists every reason why this backend cannot run on this device, or in this type."""
        reasons = []
        version = installed_version()
        if importlib.util.find_spec("triton") is None:
            reasons.append("the package triton is not installed")
        elif version is not None and version < OLDEST_TRITON:
            reasons.append(f"needs triton >= {_dotted(OLDEST_TRITON)}, found {_dotted(version)}")
        if device is not None and device.type != "cuda":
            reasons.append(f"runs on cuda devices, not on {device.type}")
        elif not torch.cuda.is_available():
            reasons.append("torch finds no GPU")
        elif torch.version.hip:
            reasons += _amd_obstacles(torch.cuda.get_device_properties(device).gcnArchName)
        else:
            reasons += _capability_obstacles(version, torch.cuda.get_device_capability(device))
        if compute_dtype == torch.float64:
            reasons.append("computes in float32, float16 or bfloat16, not in float64")
        return reasons

    def register_kernels(self) -> None:
        """Registers launchers that import Triton when they are called."""
        forward = _on_device("forward", "head_fwd")
        backward = _on_device("backward", "head_bwd")
        step = _on_device("step", "head_step")
        ops.implement_head(self.name, forward, backward, "CUDA", step)
        held, loss = (_on_device("loss", name, tunes=False) for name in ("head_held", "head_loss"))
        row_ops.implement_rows(self.name, held, loss, "CUDA")

    def tiles_shape(self, n: int, c: int) -> tuple[int, int]:
        """Returns a row for each row of x, with classes padded to whole tiles."""
        return configs.tiles_shape(n, c)

    def keeps_rounded(self, device: torch.device, d: int) -> bool:
        """Says whether forward can keep w as it rounds it: where rows need no padding."""
        return d % configs.ROW_PADDING == 0

    def notes(self) -> list[str]:
        """Lists what a user should know of this backend on the current device."""
        if not torch.cuda.is_available():
            return []
        if torch.version.hip:
            return [f"its configurations for {AMD} are unmeasured"]
        version, has = installed_version(), torch.cuda.get_device_capability()
        if version is None or version >= FENCED_TRITON or has[0] not in _FENCED_CAPABILITIES:
            return []
        return [
            f"triton {_dotted(version)} leaves out a fence (fence.proxy.async) on compute "
            f"capability {_dotted(has)}; wrong results were seen with 3.7.0 on 10.0 alone, and "
            "3.7.1 mends it"
        ]


def _amd_obstacles(architecture: str) -> list[str]:
    """Lists why these kernels cannot run on an AMD GPU, as ``gcnArchName`` describes it."""
    found = architecture.partition(":")[0]  # features may follow
    if found == AMD:
        return []
    return [f"its tiles are for {AMD}, and were compiled for no other of AMD's GPUs, found {found}"]


def _capability_obstacles(version: tuple[int, ...] | None, has: tuple[int, int]) -> list[str]:
    """Lists why these kernels cannot run on a GPU of compute capability ``has``."""
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


@functools.cache
def installed_version() -> tuple[int, int, int] | None:
    """Returns the version of the installed Triton, or None where no package says it."""
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
        if numbers is not None:
            major, minor, patch = map(int, numbers.groups("0"))
            return major, minor, patch
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _on_device(module: str, name: str, tunes: bool = True) -> Callable:
    """Returns an op of a module of this folder, run on the device of its first argument.

    ``tunes`` says whether it has configurations to choose from.
    """

    @functools.cache
    def loaded() -> tuple[ModuleType, ModuleType]:
        from . import tuning

        return importlib.import_module(f".{module}", __name__), tuning

    def run(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, ...]:
        kernels, tuning = loaded()
        op = getattr(kernels, name)
        if tunes and os.environ.get("MARGINKERNELS_AUTOTUNE") == "1":
            # timing repeats the call
            timed = kernels.without_writing(args) if name == "head_step" else args
            settings["config"] = tuning.fastest(op, x, *timed, **settings)
        return op(x, *args, **settings)

    def call(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, ...]:
        # kernels go to the current device; an autocast around the call must not narrow the GEMMs.
        # Both contexts together take the host as long as a launch: only where they change something
        if x.device.index == torch.cuda.current_device() and not torch.is_autocast_enabled("cuda"):
            return run(x, *args, **settings)
        with torch.cuda.device(x.device), torch.autocast("cuda", enabled=False):
            return run(x, *args, **settings)

    return call
