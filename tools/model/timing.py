# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Estimates the time of one launch on one GPU from what it asks for.

Each estimate is a sum of what does not overlap over a maximum of what does:

    row kernel   max(memory, L2, instructions, waits for memory) + ramp
    GEMM         max(tensor cores, memory) + part of what it writes + L2 + ramp
    tile kernel  for each tile of a multiprocessor: max(tensor cores, L2) + G written, and where
                 one program runs alone: the first copies + the epilogue; all that at least as long
                 as the memory takes to read w once
"""

from .code import Code
from .gpus import Gpu
from .recording import GEMM, TILE, Launch

# seconds
RAMP = 1.2e-6  # of a kernel: to start its programs and to wait for the last
GEMM_RAMP = 4e-6
FILL = 1.0e-6  # from a tile's first copy to its first matrix instruction, and the wait for the last
UNHIDDEN = 0.2  # of what two programs do beside their main loops: the rest is under the other's
FLAT_WRITE = 0.6  # of G's way to memory, where copies for the next tile go on meanwhile
# of what a GEMM writes to memory: the rest goes on under the next tile
GEMM_WRITE = 0.7
LANES = 32
# of a copy's bandwidth, where five arrays are walked at once
STREAMING = {"SGD": 0.86, "update_kernel": 0.86}
WAIT = 1e-6  # for memory, with the others' traffic


def seconds(launch: Launch, gpu: Gpu, code: Code | None) -> float:
    """Returns the time of a launch; ``code`` has the counts of its kernel."""
    if launch.kind == TILE:
        if code is None:
            raise ValueError(f"code: expected the counts of {launch.name}, got None")
        return tile_kernel(launch, gpu, code)
    if launch.kind == GEMM:
        return gemm(launch, gpu)
    return row_kernel(launch, gpu, code)


def row_kernel(launch: Launch, gpu: Gpu, code: Code | None) -> float:
    """Returns the time of a kernel that walks along rows, or of an operation of PyTorch."""
    moved = launch.read + launch.written
    memory = moved / (gpu.bandwidth * STREAMING.get(launch.name, 1.0))
    # a row that is read twice comes from L2 the second time
    cache = (moved + 2 * launch.cached) / gpu.l2_bandwidth
    issue = waits = 0.0
    if code is not None:
        issue = launch.rows * code.row / gpu.issue
        waves = max(1.0, launch.programs / (code.programs * gpu.multiprocessors))
        waits = waves * WAIT * (code.waits + code.waits_per_label * launch.rows)
    return max(memory, cache, issue, waits) + RAMP


def gemm(launch: Launch, gpu: Gpu) -> float:
    """Returns the time of a GEMM of the vendor's library."""
    tensor = launch.flops / (gpu.tensor * gpu.gemm)
    memory = launch.read / gpu.bandwidth
    written = GEMM_WRITE * launch.written / gpu.bandwidth + launch.cached / gpu.l2_bandwidth
    return max(tensor, memory) + written + GEMM_RAMP


def tile_kernel(launch: Launch, gpu: Gpu, code: Code) -> float:
    """Returns the time of statistics_kernel or gradient_kernel."""
    tile = launch.tile
    if tile is None:
        raise ValueError(f"tile: expected one in a launch of {launch.name}, got None")
    together = min(code.programs, -(-launch.programs // gpu.multiprocessors))
    logits = tile.block_n * tile.block_c
    d = launch.flops / (2 * launch.tiles * logits)
    share = gpu.mma_sync if launch.host == "cpp" else gpu.own
    # of one tile, as if a multiprocessor had it alone
    tensor = gpu.multiprocessors * 2 * logits * d / (gpu.tensor * share)
    copies = gpu.multiprocessors * (tile.block_n + tile.block_c) * d * 2 / gpu.l2_bandwidth
    written = gpu.multiprocessors * launch.written / launch.tiles / gpu.bandwidth
    exponentials = gpu.multiprocessors * logits * code.exponentials / gpu.exponentials
    instructions = gpu.multiprocessors * logits * code.epilogue / LANES / gpu.issue
    after = max(exponentials, instructions)
    # without a tile before, nothing has been copied ahead
    before = FILL * ((not tile.flatten) + (launch.programs >= launch.tiles))
    beside = before + after if together == 1 else UNHIDDEN * (before + after)
    each = max(tensor, copies) + beside + written * (FLAT_WRITE if tile.flatten else 1)
    # tiles that the busiest multiprocessor has
    waves = -(-launch.programs // (together * gpu.multiprocessors))
    turns = waves * together * -(-launch.tiles // launch.programs)
    return max(turns * each, launch.read / gpu.bandwidth) + RAMP
