# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the ops in C++ and CUDA (csrc/): loading the extension registers their kernels.

An extension that was compiled for another torch may crash on loading. The build leaves the versions
that it was made for in a file beside it; they are compared first.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch

from ..numerics import TILE_PADDING
from ..version import __version__
from .base import Backend

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of a step of the CUDA kernels' main loop, see csrc/cuda/kernels.h
_TILE_FEATURES = 32
# the build writes its versions here; see setup.py
_RECORD = Path(__file__).parents[1] / "_C.json"


def _load() -> tuple[ModuleType | None, list[str]]:
    """Returns the extension, or None and the reason."""
    if not _RECORD.exists():
        return None, ["marginkernels was installed without its extension (MARGINKERNELS_EXT=0)"]
    built_for = json.loads(_RECORD.read_text())
    built_for.pop("left_out", None)
    running = {"marginkernels": __version__, "torch": str(torch.__version__)}
    if built_for != running:
        reason = (
            f"the extension was built for {_versions(built_for)} but this is {_versions(running)}: "
            "reinstall marginkernels (pip install --force-reinstall --no-deps --no-cache-dir)"
        )
    else:
        try:
            from .. import _C  # type: ignore[attr-defined] # compiled, without a stub

            _C.build_info()  # raises where MARGINKERNELS_CPU asks for more than the CPU has
            return _C, []
        except (ImportError, RuntimeError) as error:
            reason = f"the extension does not load: {error}"
    # most users name no backend: they should hear of it
    warnings.warn(f"no native backend: {reason}", RuntimeWarning, stacklevel=2)
    return None, [reason]


def _versions(packages: dict[str, str]) -> str:
    return " and ".join(f"{package} {version}" for package, version in packages.items())


extension, load_failure = _load()


@dataclasses.dataclass(frozen=True)
class NativeBackend(Backend):
    """Runs the extension, on the CPU and on NVIDIA GPUs."""

    name: ClassVar[str] = "native"
    priority: ClassVar[int] = 20
    updates: ClassVar[bool] = True
    fuses_rows: ClassVar[bool] = True

    extension: ModuleType | None
    load_failure: list[str]

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Lists every reason why the extension cannot run on this device, or in this type."""
        found = list(self.load_failure)
        allowed = list(_COMPUTE_DTYPES)
        if device is not None and device.type == "cuda":
            if self.extension is not None:
                found += _cuda_obstacles(self.extension, device)
            allowed.append(torch.float64)
        elif device is not None and device.type != "cpu":
            found.append(f"it runs on the CPU and on CUDA, got a tensor on {device.type}")
        if compute_dtype not in (None, *allowed):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            found.append(f"it computes in {names} there, got {compute_dtype}")
        return found

    def tiles_shape(self, n: int, c: int) -> tuple[int, int]:
        """Returns a row for each class, with rows of x padded to whole vectors."""
        return c, -(-n // TILE_PADDING) * TILE_PADDING

    def keeps_rounded(self, device: torch.device, d: int) -> bool:
        """Says whether rows of w have the width that the CUDA kernels read."""
        return device.type == "cuda" and d % _TILE_FEATURES == 0


def _cuda_obstacles(extension: ModuleType, device: torch.device) -> list[str]:
    """Lists why the extension's CUDA kernels cannot run on this device."""
    info = extension.build_info()
    if info["cuda"] is None:
        left_out = json.loads(_RECORD.read_text()).get("left_out")
        return [f"it was built without CUDA: {left_out}"]
    if not torch.cuda.is_available():
        return ["there is no GPU, or none that this torch can use"]
    index = torch.cuda.current_device() if device.index is None else device.index
    failure = extension.cuda_failure(index)
    if failure:
        major, minor = torch.cuda.get_device_capability(index)
        built_for = ", ".join(info["cuda_architectures"])
        return [
            f"it was built for compute capability {built_for}, got {major}.{minor}: {failure} "
            "(TORCH_CUDA_ARCH_LIST is for which GPUs it is built)"
        ]
    return []
