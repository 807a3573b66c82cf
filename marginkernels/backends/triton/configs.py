# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The table of tile configurations, one per family of GPUs; each was chosen from compiled code."""

import enum
import functools
from typing import NamedTuple

import torch


class Load(enum.IntFlag):
    """What is compiled into a tile kernel, and takes registers."""

    PLAIN = 1
    EXTRAS = 2  # a bias, sums of logits, saved tiles, the gradient of the scale
    TRANSFORM = 4  # of the negatives, perhaps with sums and the gradient of the scale
    LIGHT = PLAIN | EXTRAS
    HEAVY = EXTRAS | TRANSFORM
    ANY = PLAIN | EXTRAS | TRANSFORM


class Config(NamedTuple):
    """A tile of the tile program, and how it is compiled."""

    block_n: int  # rows
    block_c: int  # classes
    block_d: int  # features per step of the main loop
    num_warps: int
    num_stages: int
    ctas: int  # programs that fit on a multiprocessor together
    min_rows: int = 0  # of the batch
    serves: Load = Load.ANY  # what fits into its registers


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
    name: str  # in TABLE
    multiprocessors: int


@functools.lru_cache
def target(device: torch.device) -> Target:
    """The row of the table for a device. A CPU, where launches are simulated, has an sm_80's."""
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
    return n, (c + 127) // 128 * 128


def kind(compute_dtype: torch.dtype, target_name: str) -> str:
    """Of arithmetic: "half", "tf32" where torch allows it and the target has it, or "fp32"."""
    if compute_dtype != torch.float32:
        return "half"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and "tf32" in TABLE[target_name] else "fp32"


def load(transform: object | None, *extras: bool) -> Load:
    """Of a call with this transform, or None, and with any of the extras."""
    if transform is not None:
        return Load.TRANSFORM
    return Load.EXTRAS if any(extras) else Load.PLAIN


def choose(target_name: str, kind: str, load: Load, rows: int) -> Config:
    """The configuration for a batch of ``rows``; one for a range of sizes, so few are compiled."""
    return next(
        config
        for config in TABLE[target_name][kind]
        if rows >= config.min_rows and load & config.serves
    )
