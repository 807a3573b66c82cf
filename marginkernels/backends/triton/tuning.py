# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Finds, with MARGINKERNELS_AUTOTUNE=1, the fastest configuration on the user's own device.

The configurations of the table and others are timed once per op and class of shapes, on the
operands of the call: for forward the tiles of the statistics, for backward those of the gradient. A
file keeps the fastest one by device and version of Triton.
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

# tiles beyond the table: rows, classes, features per step, warps, stages, programs together
TILES = {
    "half": [
        (128, 128, 64, 4, 3, 2),
        (128, 128, 64, 8, 3, 2),
        (128, 128, 64, 8, 4, 1),
        (128, 256, 64, 8, 3, 1),
        (256, 128, 64, 8, 3, 1),
        (128, 128, 32, 4, 3, 2),
        (128, 128, 32, 4, 5, 2),
        (128, 256, 32, 8, 3, 1),
        (256, 128, 32, 8, 3, 1),
        (128, 64, 32, 4, 2, 3),
        (128, 64, 64, 4, 3, 3),
        (64, 128, 32, 4, 4, 2),
        (64, 128, 64, 4, 3, 3),
        (64, 256, 64, 4, 2, 2),
    ],
    "tf32": [(128, 128, 32, 4, 3, 2), (128, 128, 32, 8, 3, 1), (64, 128, 32, 4, 3, 2)],
    "fp32": [(128, 64, 16, 8, 3, 1), (64, 128, 16, 8, 3, 1), (64, 64, 32, 8, 3, 1)],
}
# bytes of a multiprocessor
SHARED_MEMORY = {
    "sm_80": 164 << 10,
    "sm_86": 100 << 10,
    "sm_90": 228 << 10,
    "sm_100": 228 << 10,
    "sm_120": 100 << 10,
    "gfx942": 64 << 10,
}
REGISTERS = 65536  # of a multiprocessor
REGISTERS_BESIDE = 40  # the least that a thread needs beside its logits
DESCRIPTOR_TARGETS = ("sm_90", "sm_100")


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
        saves_tiles, sub_centers = settings.get("save_tiles", False), settings.get("sub_centers", 1)
        timed = candidates(target, kind, len(x), saves_tiles, sub_centers)
        found[key] = min(
            timed, key=lambda config: _time(lambda: op(x, w, *operands, **settings, config=config))
        )
        _write(key, found[key])
    return found[key]


def candidates(
    target: str, kind: str, rows: int, saves_tiles: bool, sub_centers: int = 1
) -> list[Config]:
    """Lists the table's configurations, and the tiles beyond that may run on this target.

    With sub-centres each has a main loop of its own, and an epilogue that no loop takes in.
    """
    table, several = configs.TABLE[target][kind], sub_centers > 1
    if several:
        table = [config for config in table if config.serves & configs.Load.CENTERS]
    beyond = [Config(*tile) for tile in TILES[kind]]
    tried = table + [tile for tile in beyond if fits(tile, target, kind, 3 if several else 1)]
    if target in DESCRIPTOR_TARGETS:
        tried += [config._replace(descriptors=True, flatten=not several) for config in tried]
    # what a configuration serves is of no account when it is measured
    unique = dict.fromkeys(config._replace(serves=configs.Load.ANY) for config in tried)
    return [
        config
        for config in unique
        if config.block_n <= max(64, triton.next_power_of_2(rows))
        and not (saves_tiles and configs.TILES_PADDING % config.block_c)
    ]


def fits(config: Config, target: str, kind: str, held: int = 1) -> bool:
    """Returns whether a multiprocessor may have registers and shared memory for the programs.

    Args:
        config: the tile.
        target: the row of the table.
        kind: of arithmetic.
        held: tiles that a program has in registers.
    """
    threads = 32 * config.num_warps
    registers = held * config.block_n * config.block_c // threads + REGISTERS_BESIDE
    size = 2 if kind == "half" else 4
    stage = (config.block_n + config.block_c) * config.block_d * size
    shared = config.num_stages * stage + (1 << 10)
    return (
        registers <= min(255, REGISTERS // (threads * config.ctas))
        and config.ctas * shared <= SHARED_MEMORY[target]
    )


def _time(call: Callable[[], object]) -> float:
    """Returns the time of a call, infinite where the device has no room for it."""
    try:
        return triton.testing.do_bench(call)
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _shape_class(op: Callable, x: Tensor, w: Tensor, settings: dict) -> str:
    """Describes a call: sizes up to the next power of two, and what is compiled in or out."""
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"
    sizes = [triton.next_power_of_2(size) for size in (*x.shape, len(w))]
    precision = torch.backends.cuda.matmul.fp32_precision
    flags = [str(v) for v in settings.values() if isinstance(v, bool | str | torch.dtype)]
    flags.append(str(settings.get("sub_centers", 1)))
    parts = (device, triton.__version__, op.__name__, *sizes, w.dtype, precision, *flags)
    return " ".join(map(str, parts))


def _read() -> dict[str, Config]:
    try:
        return {
            key: Config(**fields) for key, fields in json.loads(cache_file().read_text()).items()
        }
    except (OSError, ValueError, TypeError):  # none yet, or another version's
        return {}


def _write(key: str, config: Config) -> None:
    entries = {key: config._asdict() for key, config in {**_read(), key: config}.items()}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(entries, indent=1))
    temporary.replace(path)  # other processes see all of it or nothing
