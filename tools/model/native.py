# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists the launches of the CUDA C++ backend, by the rules of csrc/cuda.

C++ cannot be recorded without a GPU: this repeats the sizes of chunks that operands.cpp,
sources.cpp and backward.cpp choose. What Python launches around the sweep is recorded.
"""

from collections import Counter

import torch

from .code import Code, Tile
from .gpus import Gpu
from .recording import GEMM, PASS, SPLITS, TILE, Launch, Shape, Step, record

MIB = 1 << 20
W_CHUNK, G_CHUNK, DW_CHUNK = 32 * MIB, 64 * MIB, 16 * MIB
TILE_CLASSES = 128
BIG, SMALL = Tile(128, 128, 32, 4, 3), Tile(64, 128, 32, 4, 3)
# of docs/cuda_kernels.md: blocks per multiprocessor, instructions per logit after the main loop
CODE = {
    "statistics_kernel": Code(2, epilogue=6.0, exponentials=1.0),
    "gradient_kernel": Code(2, epilogue=8.0, exponentials=1.0),
}


def chunks(total: int, most: int) -> list[int]:
    """Cuts ``total`` classes into chunks of at most ``most``."""
    return [min(most, total - start) for start in range(0, total, most)]


def listed(shape: Shape, weights: torch.dtype, gpu: Gpu, optimizer: str = "") -> Step:
    """Returns the launches of a step, as recording.record does for Triton."""
    found = record(shape, weights, gpu, optimizer).around.copy()
    found.update(_forward(shape, weights, gpu, optimizer == "fused"))
    found.update(_backward(shape, weights, gpu, optimizer == "fused"))
    return Step(found, Counter())


def _passed(name: str, read: int, written: int = 0, cached: int = 0) -> Launch:
    return Launch(name, PASS, read, written, cached, host="cpp")


def _w_chunks(shape: Shape, weights: torch.dtype, most: int) -> list[int]:
    if weights != torch.bfloat16:
        most = min(most, W_CHUNK // (2 * shape.d))
    return chunks(shape.c, max(TILE_CLASSES, most // TILE_CLASSES * TILE_CLASSES))


def _rounded(count: int, shape: Shape, weights: torch.dtype) -> list[Launch]:
    if weights == torch.bfloat16:
        return []
    return [_passed("round w", count * shape.d * 4, count * shape.d * 2)]


def _tiles(name: str, count: int, shape: Shape, gpu: Gpu, written: int) -> Launch:
    tile = SMALL if shape.n <= SMALL.block_n else BIG
    tiles = -(-shape.n // tile.block_n) * -(-count // tile.block_c)
    flops = 2 * tiles * tile.block_n * tile.block_c * shape.d
    return Launch(
        name, TILE, count * shape.d * 2, written, 0, flops, 0, tile, tiles,
        2 * gpu.multiprocessors, "cpp",
    )  # fmt: skip


def _forward(shape: Shape, weights: torch.dtype, gpu: Gpu, norms_known: bool) -> list[Launch]:
    small = [_passed("small", 0)] * 6  # x, its norms, flags, rows, targets' rows, the merge
    found = list(small)
    for count in _w_chunks(shape, weights, shape.c):
        found += _rounded(count, shape, weights)
        if not norms_known:
            found.append(_passed("norm_kernel", count * shape.d * 2))
        found.append(_tiles("statistics_kernel", count, shape, gpu, 0))
    return found


def _backward(shape: Shape, weights: torch.dtype, gpu: Gpu, fused: bool) -> list[Launch]:
    n, _, d = shape
    itemsize = weights.itemsize
    found = [_passed("small", 0)] * 9 + [_passed("target_kernel", n * d * 4)]
    most = DW_CHUNK // (4 * d)
    for count in _w_chunks(shape, weights, G_CHUNK // (2 * n)):
        found += _rounded(count, shape, weights)
        found.append(_tiles("gradient_kernel", count, shape, gpu, n * count * 2))
        found.append(
            Launch("dx GEMM", GEMM, (n + d) * count * 2, 0, 0, 2 * n * count * d, host="cpp")
        )
        found.append(_passed("split-K sum", 0, 0, SPLITS * n * d * 4))
        for part in chunks(count, most):
            raw = part * d * 4
            found.append(
                Launch("dw GEMM", GEMM, n * part * 2, 0, raw, 2 * n * part * d, host="cpp")
            )
            if fused:
                moved = 2 * part * d * itemsize  # weights and momentum
                found.append(_passed("update_kernel", moved, moved, raw))
            else:
                found.append(_passed("project_kernel", part * d * 2, part * d * itemsize, raw))
    return found
