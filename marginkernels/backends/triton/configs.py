# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the table of tile configurations by family of GPUs.

Those of sm_90 for 16-bit types were measured on one H200, the others chosen from compiled code.
"""

import enum
import functools
from typing import NamedTuple

import torch

from ...transforms import TRANSFORMS


class Load(enum.IntFlag):
    """Says what is compiled into which tile kernel, and takes registers."""

    STATISTICS = 1  # and nothing else
    STATISTICS_EXTRAS = 2  # a bias, sums of logits, several targets of a row
    STATISTICS_SAVED = 4  # saved tiles
    STATISTICS_TRANSFORM = 8  # of the negatives, perhaps with extras
    GRADIENT = 16
    GRADIENT_EXTRAS = 32  # likewise, and the gradient of the scale
    GRADIENT_TRANSFORM = 64
    STATISTICS_CENTERS = 128  # several of each class, perhaps with extras and a transform
    GRADIENT_CENTERS = 256
    STATISTICS_BINARY = 512  # a transform one versus rest, perhaps with extras
    GRADIENT_BINARY = 1024
    PLAIN = STATISTICS | GRADIENT
    EXTRAS = STATISTICS_EXTRAS | STATISTICS_SAVED | GRADIENT_EXTRAS
    BINARY = STATISTICS_BINARY | GRADIENT_BINARY
    TRANSFORM = STATISTICS_TRANSFORM | GRADIENT_TRANSFORM | BINARY
    CENTERS = STATISTICS_CENTERS | GRADIENT_CENTERS
    ANY = PLAIN | EXTRAS | TRANSFORM | CENTERS


class Config(NamedTuple):
    """Describes a tile of the tile program, and how it is compiled."""

    block_n: int  # rows
    block_c: int  # classes
    block_d: int  # features per step of the main loop
    num_warps: int
    num_stages: int
    ctas: int  # programs that fit on a multiprocessor together
    serves: Load = Load.ANY  # what fits into its registers
    descriptors: bool = False  # copies by tensor descriptors (TMA), on sm_90 and later
    # the main loop and what follows it are one loop: copies for the next tile start while the
    # logits of this one are worked on, which takes registers
    flatten: bool = False


# saved exponentials are padded to a multiple of this, which a block_c that serves them divides
TILES_PADDING = 128
# every block_d divides it
ROW_PADDING = 64
# the first tile that serves a load is used, unless a later one has so many fewer rows of padding:
# on one H200 a tile of 64 rows took 1.13 (gradient) to 1.40 (statistics) times as long per logit
WORTH_PADDING = 1.25

_FOUR_WARPS = Load.STATISTICS_EXTRAS | Load.STATISTICS_TRANSFORM
# what takes a second and a third tile of registers
_SMALLER = Load.TRANSFORM | Load.CENTERS
_SMALL = Load.PLAIN | Load.STATISTICS_SAVED
_SAVED_OR_TRANSFORMED = Load.STATISTICS_SAVED | Load.STATISTICS_TRANSFORM | Load.STATISTICS_BINARY
_GRADIENT_TRANSFORMED = Load.GRADIENT_TRANSFORM | Load.GRADIENT_BINARY
_FP32 = [
    Config(64, 64, 16, 4, 3, 2, Load.PLAIN | Load.TRANSFORM),
    Config(64, 64, 16, 8, 3, 1, Load.EXTRAS | Load.CENTERS),
]
_TF32 = [
    Config(128, 64, 32, 4, 3, 2, Load.STATISTICS),
    Config(128, 64, 32, 8, 3, 1, Load.ANY & ~Load.STATISTICS),
]
# by target and kind of arithmetic, in the order of preference; see choose
TABLE: dict[str, dict[str, list[Config]]] = {
    "sm_80": {
        "half": [
            Config(128, 128, 32, 4, 3, 2, Load.GRADIENT),
            Config(128, 128, 64, 8, 3, 1, Load.PLAIN | Load.EXTRAS),
            Config(64, 64, 64, 4, 3, 3, Load.PLAIN | Load.EXTRAS),
            Config(128, 64, 64, 8, 3, 1, _SMALLER),
        ],
        "tf32": _TF32,
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, Load.PLAIN | _SAVED_OR_TRANSFORMED & Load.TRANSFORM),
            Config(64, 64, 16, 8, 2, 1, Load.STATISTICS_EXTRAS),
            Config(
                64,
                64,
                16,
                8,
                3,
                1,
                Load.EXTRAS & ~Load.STATISTICS_EXTRAS | Load.CENTERS | _GRADIENT_TRANSFORMED,
            ),
        ],
    },
    "sm_86": {
        "half": [
            Config(128, 128, 32, 4, 3, 2, Load.GRADIENT),
            Config(128, 128, 32, 8, 3, 1, Load.PLAIN | Load.EXTRAS),
            Config(64, 64, 64, 4, 3, 3, Load.PLAIN | Load.EXTRAS),
            Config(128, 64, 32, 8, 3, 1, _SMALLER),
        ],
        "tf32": _TF32,
        "fp32": _FP32,
    },
    "sm_90": {
        "half": [
            # measured on one H200 by Triton 3.6, bf16, D = 512, C = 262,144, in TFLOP/s at N = 1024
            # and 256: statistics 656 and 589, without descriptors 574 and 518, with (128, 256, 64,
            # 8, 3) 589 and 556; gradient 543 and 466, without 432 and 388
            Config(128, 128, 64, 4, 3, 2, Load.PLAIN, descriptors=True, flatten=True),
            # what compiles without spills. Without descriptors, plain, C = 1,000,000: statistics
            # 584 and 555, with 8 warps 397 and 390; gradient 420 and 370, with 8 warps 423 and 371.
            # Statistics with saved tiles, N = 1024: 397 with 64 rows, 322 with 128 and 8 warps
            Config(128, 128, 64, 4, 3, 2, _FOUR_WARPS, descriptors=True),
            Config(128, 128, 64, 8, 3, 1, Load.GRADIENT_EXTRAS, descriptors=True),
            Config(
                128,
                64,
                64,
                8,
                3,
                1,
                Load.GRADIENT_TRANSFORM | Load.CENTERS | Load.BINARY,
                descriptors=True,
            ),
            Config(64, 128, 64, 4, 3, 2, _SMALL, descriptors=True, flatten=True),
            Config(64, 128, 64, 4, 3, 2, Load.EXTRAS | Load.TRANSFORM & ~Load.BINARY),
        ],
        "tf32": [
            Config(128, 64, 32, 4, 3, 2, Load.ANY & ~Load.CENTERS & ~Load.BINARY),
            Config(128, 64, 32, 8, 3, 1, Load.CENTERS | Load.BINARY),
        ],
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, Load.GRADIENT | _SAVED_OR_TRANSFORMED),
            Config(64, 64, 16, 8, 2, 1, Load.STATISTICS_EXTRAS),
            Config(
                64,
                64,
                16,
                8,
                3,
                1,
                Load.ANY & ~Load.GRADIENT & ~Load.STATISTICS_EXTRAS & ~_SAVED_OR_TRANSFORMED,
            ),
        ],
    },
    "sm_100": {
        "half": [
            Config(128, 128, 64, 8, 3, 1, Load.PLAIN | Load.EXTRAS),
            Config(64, 128, 64, 4, 3, 2, Load.PLAIN | Load.EXTRAS),
            Config(128, 64, 64, 8, 3, 1, Load.TRANSFORM),
            Config(64, 64, 64, 8, 3, 1, Load.GRADIENT_CENTERS),
            Config(64, 32, 64, 4, 3, 2, Load.STATISTICS_CENTERS),
        ],
        "tf32": [
            Config(128, 64, 32, 4, 3, 2, Load.GRADIENT),
            Config(128, 64, 32, 8, 3, 1, Load.STATISTICS | Load.EXTRAS | Load.TRANSFORM),
            Config(64, 64, 32, 8, 3, 1, Load.GRADIENT_CENTERS),
            Config(64, 32, 32, 4, 3, 2, Load.STATISTICS_CENTERS),
        ],
        "fp32": [
            Config(64, 64, 16, 4, 3, 2, Load.ANY & ~Load.CENTERS & ~Load.STATISTICS_EXTRAS),
            Config(64, 64, 16, 8, 2, 1, Load.STATISTICS_EXTRAS),
            Config(64, 64, 16, 8, 3, 1, Load.CENTERS),
        ],
    },
    "sm_120": {
        "half": [
            Config(128, 128, 32, 4, 3, 2, Load.PLAIN),
            Config(128, 128, 32, 8, 3, 1, Load.EXTRAS),
            Config(64, 128, 64, 4, 2, 2, Load.PLAIN | Load.EXTRAS),
            Config(128, 64, 64, 8, 3, 1, _SMALLER),
        ],
        "tf32": [
            Config(128, 64, 32, 4, 3, 2, Load.PLAIN),
            Config(128, 64, 32, 8, 3, 1, Load.EXTRAS | Load.TRANSFORM),
            Config(64, 64, 32, 8, 3, 1, Load.CENTERS),
        ],
        "fp32": _FP32,
    },
    "gfx942": {
        "half": [
            Config(128, 128, 64, 8, 2, 1, Load.ANY & ~Load.CENTERS),
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


def load(
    kernel: str, transform: str, sub_centers: int, *, saved: bool = False, extras: bool
) -> Load:
    """Returns the load of a kernel, "statistics" or "gradient", in a call with these settings."""
    name = kernel.upper()
    if sub_centers > 1:
        return Load[f"{name}_CENTERS"]
    # a name that is not there is refused later
    if transform in TRANSFORMS and TRANSFORMS[transform].one_versus_rest:
        return Load[f"{name}_BINARY"]
    if transform != "identity":
        return Load[f"{name}_TRANSFORM"]
    if saved:
        return Load.STATISTICS_SAVED
    return Load[f"{name}_EXTRAS"] if extras else Load[name]


def choose(target_name: str, kind: str, load: Load, rows: int) -> Config:
    """Returns the configuration for ``rows``: one for a range of sizes, so that few compile."""
    serving = [config for config in TABLE[target_name][kind] if load & config.serves]
    padded = [-(-max(rows, 1) // config.block_n) * config.block_n for config in serving]
    return next(
        config
        for config, size in zip(serving, padded, strict=True)
        if size <= WORTH_PADDING * min(padded)
    )


# programs of the statistics run in waves, all multiprocessors at once, and the last may be short
MOST_WAVES = 32
START = 0.25  # what a program takes to start, in class tiles


@functools.lru_cache(maxsize=1024)
def columns(slots: int, row_tiles: int, class_tiles: int) -> int:
    """Returns the programs per row tile, which share its class tiles.

    Args:
        slots: programs that run at the same time.
        row_tiles: of the batch.
        class_tiles: of a launch.
    """

    def time(columns: int) -> float:
        waves = -(-row_tiles * columns // slots)
        return waves * (-(-class_tiles // columns) + START)

    row_tiles, class_tiles = max(row_tiles, 1), max(class_tiles, 1)
    whole_waves = (waves * slots // row_tiles for waves in range(1, MOST_WAVES + 1))
    return min((min(max(n, 1), class_tiles) for n in whole_waves), key=time)
