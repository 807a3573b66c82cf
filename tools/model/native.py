# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists the launches of the CUDA C++ backend, by the rules of csrc/cuda.

C++ cannot be recorded without a GPU. This repeats how forward.cpp, sources.cpp and backward.cpp cut
the classes into chunks, with the sizes that they name. What Python launches around the sweep is
recorded.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from marginkernels import sweep

from .code import Code, Tile
from .gpus import Gpu
from .recording import GEMM, PASS, SPLITS, TILE, Launch, Shape, Step, record

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
MIB = 1 << 20
TILE_CLASSES = 128
BIG, SMALL = Tile(128, 128, 32, 4, 3), Tile(64, 128, 32, 4, 3)
# of docs/cuda_kernels.md: blocks per multiprocessor, instructions per logit after the main loop
CODE = {
    "statistics_kernel": Code(2, epilogue=5.7, exponentials=1.0),
    "gradient_kernel": Code(2, epilogue=4.5, exponentials=1.0),
}
# x, its rows' numbers and the flags of tiles; the merge, or the targets and dx
AROUND_FORWARD, AROUND_BACKWARD = 3, 4


class Work(NamedTuple):
    """Describes a step to the functions below."""

    shape: Shape
    weights: torch.dtype
    gpu: Gpu
    fused: bool

    @property
    def rounded(self) -> bool:
        """Says whether w has to be rounded for the kernels."""
        return self.weights != torch.bfloat16

    @property
    def kept(self) -> bool:
        """Says whether forward keeps the rounded w for backward."""
        return self.rounded and 2 * self.shape.c * self.shape.d <= sweep._ROUNDED_BYTES


@functools.cache
def size_of(name: str) -> int:
    """Returns a number of MiB that a file of csrc/cuda names."""
    text = "".join(path.read_text() for path in sorted(CSRC.glob("*.*")))
    found = re.search(rf"\b{name} = (\d+) \* kMiB", text)
    if found is None:
        raise LookupError(f"expected {name} in {CSRC}, found none")
    return int(found[1]) * MIB


def chunks(c: int, most_bytes: int, class_bytes: int) -> Iterator[int]:
    """Yields the classes of each chunk, as chunk_of in operands.cpp."""
    most = max(most_bytes // max(class_bytes, 1), 1)
    count = -(-c // -(-c // most))
    count = -(-count // TILE_CLASSES) * TILE_CLASSES
    yield from (min(count, c - first) for first in range(0, c, count))


def listed(shape: Shape, weights: torch.dtype, gpu: Gpu, optimizer: str = "") -> Step:
    """Returns the launches of a step, as recording.record does for Triton."""
    work = Work(shape, weights, gpu, optimizer == "fused")
    around = record(shape, weights, gpu, optimizer).around
    # the kernels on N numbers, which both backends have
    found = Counter({
        launch._replace(host="cpp" if launch.host == "triton" else launch.host): calls
        for launch, calls in around.items()
    })  # fmt: skip
    found.update(_forward(work))
    found.update(_backward(work))
    return Step(found, Counter())


def _forward(work: Work) -> Iterator[Launch]:
    c, d = work.shape.c, work.shape.d
    yield from [_walks("small", 0)] * AROUND_FORWARD
    for count in chunks(c, size_of("kWChunkBytes"), 2 * d if work.rounded else 0):
        if work.rounded:
            yield _walks("round_kernel", 4 * count * d, 2 * count * d)
        elif not work.fused:  # the norms are known
            yield _walks("round_kernel", 2 * count * d)
        yield _tiles("statistics_kernel", count, work, 0)


def _backward(work: Work) -> Iterator[Launch]:
    n, c, d = work.shape
    rounds = work.rounded and not work.kept
    in_place = work.weights == torch.float32 and not work.fused
    yield from [_walks("small", 0)] * AROUND_BACKWARD
    class_bytes = 2 * n + 2 * d * rounds + 4 * d * (not in_place)
    for count in chunks(c, size_of("kBackwardChunkBytes"), class_bytes):
        if rounds:
            yield _walks("round_kernel", 4 * count * d, 2 * count * d)
        yield _tiles("gradient_kernel", count, work, 2 * n * count)
        flops, g, w, raw = 2 * n * count * d, 2 * n * count, 2 * count * d, 4 * count * d
        yield Launch("dx GEMM", GEMM, g + w, flops=flops, host="cpp")
        yield _walks("split-K sum", 0, cached=SPLITS * 4 * n * d)
        yield Launch("dw GEMM", GEMM, g, raw, flops=flops, host="cpp")
        stored = count * d * work.weights.itemsize
        if work.fused:  # weights and momentum
            yield _walks("update_kernel", raw + 2 * stored, 2 * stored)
        else:
            yield _walks("project_kernel", raw + w, stored)


def _walks(name: str, read: int, written: int = 0, cached: int = 0) -> Launch:
    return Launch(name, PASS, read, written, cached, host="cpp")


def _tiles(name: str, count: int, work: Work, written: int) -> Launch:
    n, _, d = work.shape
    pads_less = 4 * (-(-n // 128) * 128) > 5 * (-(-n // 64) * 64)
    tile = SMALL if pads_less else BIG
    tiles = -(-n // tile.block_n) * -(-count // tile.block_c)
    flops = 2 * tiles * tile.block_n * tile.block_c * d
    return Launch(
        name, TILE, 2 * count * d, written, 0, flops, 0, tile, tiles,
        2 * work.gpu.multiprocessors, "cpp",
    )  # fmt: skip
