# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds, with MARGINKERNELS_AUTOTUNE=1, the fastest configuration on the user's own device.

Each configuration of the table is timed once per op and class of shapes, on the operands of the
call. A file keeps the fastest one by device and version of Triton.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs
from .configs import Config

found: dict[str, Config] = {}


def cache_file() -> Path:
    """Returns the path of the file: $XDG_CACHE_HOME, or ~/.cache, /marginkernels/triton.json."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "marginkernels" / "triton.json"


def fastest(
    op: Callable, x: Tensor, w: Tensor, *operands: Tensor | None, **settings: Any
) -> Config | None:
    """Returns the configuration to use, or None, the table's own choice, if none can be timed."""
    if len(x) == 0:
        return None
    key = _shape_class(op, x, w, settings)
    if key not in found:
        found.update(_read())
    if key not in found:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        target = configs.target(x.device).name
        kind = configs.kind(settings["compute_dtype"], target)
        times = {
            config: triton.testing.do_bench(
                lambda config=config: op(x, w, *operands, **settings, config=config)
            )
            for config in configs.TABLE[target][kind]
        }
        found[key] = min(times, key=lambda config: times[config])
        _write(key, found[key])
    return found[key]


def _shape_class(op: Callable, x: Tensor, w: Tensor, settings: dict) -> str:
    """Describes a call: sizes up to the next power of two, and what is compiled in or out."""
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"
    sizes = [triton.next_power_of_2(size) for size in (*x.shape, len(w))]
    precision = torch.backends.cuda.matmul.fp32_precision
    flags = [str(v) for v in settings.values() if isinstance(v, bool | str | torch.dtype)]
    parts = (device, triton.__version__, op.__name__, *sizes, w.dtype, precision, *flags)
    return " ".join(map(str, parts))


def _read() -> dict[str, Config]:
    try:
        return {
            key: Config(*values) for key, values in json.loads(cache_file().read_text()).items()
        }
    except (OSError, ValueError, TypeError):  # none yet, or another version's
        return {}


def _write(key: str, config: Config) -> None:
    entries = {**_read(), key: config}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(entries, indent=1))
    temporary.replace(path)  # other processes see all of it or nothing
