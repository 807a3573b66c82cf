# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the table of tile configurations by family of GPUs; each was chosen from compiled code."""

import enum
import functools
from typing import NamedTuple

import torch


class Load(enum.IntFlag):
    """Says what is compiled into a tile kernel, and takes registers."""

    PLAIN = 1
    EXTRAS = 2  # a bias, sums of logits, saved tiles, the gradient of the scale
    TRANSFORM = 4  # of the negatives, perhaps with sums and the gradient of the scale
    LIGHT = PLAIN | EXTRAS
    HEAVY = EXTRAS | TRANSFORM
    ANY = PLAIN | EXTRAS | TRANSFORM


class Config(NamedTuple):
    """Describes a tile of the tile program, and how it is compiled."""

    block_n: int  # rows
    block_c: int  # classes
    block_d: int  # features per step of the main loop
    num_warps: int
    num_stages: int
    ctas: int  # programs that fit on a multiprocessor together
    min_rows: int = 0  # of the batch
    serves: Load = Load.ANY  # what fits into its registers


# saved exponentials are padded to a multiple of this; every block_c divides it
TILES_PADDING = 128

# by target and kind of arithmetic: the first one whose min_rows the batch has, and that serves the
# load, is used. Large tiles, one program to a multiprocessor, where smaller ones would be bound by
# L2.
TABLE: dict[str, dict[str, list[Config]]] = {
    "sm_80": {
        "half": [
            Config(128, 128, 64, 8, 3, 1, 65, Load.LIGHT),
            Config(64, 64, 64, 4, 3, 3, 0, Load.LIGHT),
            Config(128, 64, 64, 8, 3, 1, 0, Load.TRANSFORM),
        ],
        "tf32": [Config(128, 64, 32, 8, 3, 1)],
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, 0, Load.PLAIN | Load.TRANSFORM),
            Config(64, 64, 16, 8, 3, 1, 0, Load.EXTRAS),
        ],
    },
    "sm_86": {
        "half": [
            Config(128, 128, 32, 8, 3, 1, 65, Load.LIGHT),
            Config(64, 64, 64, 4, 3, 3, 0, Load.LIGHT),
            Config(128, 64, 32, 8, 3, 1, 0, Load.TRANSFORM),
        ],
        "tf32": [Config(128, 64, 32, 8, 3, 1)],
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, 0, Load.PLAIN | Load.TRANSFORM),
            Config(64, 64, 16, 8, 3, 1, 0, Load.EXTRAS),
        ],
    },
    "sm_90": {
        "half": [
            Config(256, 128, 64, 8, 3, 1, 256, Load.PLAIN),
            Config(128, 128, 64, 8, 3, 1, 65),
            Config(64, 128, 64, 4, 3, 2),
        ],
        "tf32": [Config(128, 64, 32, 4, 3, 2)],
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, 0, Load.PLAIN | Load.TRANSFORM),
            Config(64, 64, 16, 8, 3, 1, 0, Load.EXTRAS),
        ],
    },
    "sm_100": {
        "half": [
            Config(128, 128, 64, 8, 3, 1, 65, Load.LIGHT),
            Config(64, 128, 64, 4, 3, 2, 0, Load.LIGHT),
            Config(128, 64, 64, 8, 3, 1, 0, Load.TRANSFORM),
        ],
        "tf32": [
            Config(128, 64, 32, 4, 3, 2, 0, Load.PLAIN),
            Config(128, 64, 32, 8, 3, 1, 0, Load.HEAVY),
        ],
        "fp32": [Config(64, 64, 16, 4, 3, 2)],
    },
    "sm_120": {
        "half": [
            Config(128, 128, 32, 8, 3, 1, 65, Load.LIGHT),
            Config(64, 128, 64, 4, 2, 2, 0, Load.LIGHT),
            Config(128, 64, 64, 8, 3, 1, 0, Load.TRANSFORM),
        ],
        "tf32": [
            Config(128, 64, 32, 4, 3, 2, 0, Load.PLAIN),
            Config(128, 64, 32, 8, 3, 1, 0, Load.HEAVY),
        ],
        "fp32": [Config(64, 64, 16, 4, 3, 2)],
    },
    "gfx942": {
        "half": [
            Config(128, 128, 64, 8, 2, 1, 65),
            Config(64, 64, 64, 4, 2, 2),
        ],
        "fp32": [Config(64, 64, 16, 4, 2, 2)],
    },
}


class Target(NamedTuple):
    """Names a row of :data:`TABLE`, and the number of multiprocessors of a device."""

    name: str  # in TABLE
    multiprocessors: int


@functools.lru_cache
def target(device: torch.device) -> Target:
    """Returns the row for a device; a CPU, where launches are simulated, has that of an sm_80."""
    if device.type == "cpu":
        return Target("sm_80", 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("gfx942", properties.multi_processor_count)
    major = properties.major
    name = {8: "sm_80" if properties.minor == 0 else "sm_86", 9: "sm_90", 12: "sm_120"}
    return Target(name.get(major, "sm_100"), properties.multi_processor_count)


def tiles_shape(n: int, c: int) -> tuple[int, int]:
    """Returns the shape of saved exponentials: whole tiles of classes in every row of x."""
    return n, -(-c // TILES_PADDING) * TILES_PADDING


def kind(compute_dtype: torch.dtype, target_name: str) -> str:
    """Returns the kind of arithmetic: "half", "fp32", or "tf32" if torch and the target have it."""
    if compute_dtype != torch.float32:
        return "half"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and "tf32" in TABLE[target_name] else "fp32"


def load(transform: object | None, *extras: bool) -> Load:
    """Returns the load of a call with this transform, or None, and with any of the extras."""
    if transform is not None:
        return Load.TRANSFORM
    return Load.EXTRAS if any(extras) else Load.PLAIN


def choose(target_name: str, kind: str, load: Load, rows: int) -> Config:
    """Returns the configuration for ``rows``: one for a range of sizes, so that few compile."""
    return next(
        config
        for config in TABLE[target_name][kind]
        if rows >= config.min_rows and load & config.serves
    )
