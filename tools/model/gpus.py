# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""States what the model assumes about each GPU and its host."""

from typing import NamedTuple

MEGA = 1e6
TERA = 1e12


class Gpu(NamedTuple):
    """Describes a GPU: figures of its data sheet, and the share of them that kernels get.

    The shares were fitted on the H200 to what was measured there, and are assumed to be the same on
    the others where nothing else is said.
    """

    name: str
    arch: str  # the target that Triton compiles for
    table: str  # the row of the table of configurations
    # of the data sheet
    multiprocessors: int
    clock: float  # Hz, at which the peaks are stated
    tensor: float  # FLOP/s: bf16 with fp32 sums, dense
    memory: float  # bytes/s
    l2_size: float  # bytes
    # shares
    copy: float  # of memory, in a large copy
    gemm: float  # of tensor, in a large GEMM of the vendor's
    own: float  # of tensor, in the main loop of a tile kernel whose operands are there
    mma_sync: float  # of tensor, in the CUDA C++ kernels, which have mma.sync everywhere
    l2: float = 42.0  # bytes per clock and multiprocessor that tile kernels get out of L2

    @property
    def bandwidth(self) -> float:
        """Returns the bytes/s of a large copy."""
        return self.memory * self.copy

    @property
    def l2_bandwidth(self) -> float:
        """Returns the bytes/s that all multiprocessors get out of L2."""
        return self.l2 * self.clock * self.multiprocessors

    @property
    def issue(self) -> float:
        """Returns the instructions of a warp per second: four per clock and multiprocessor."""
        return 4 * self.clock * self.multiprocessors

    @property
    def exponentials(self) -> float:
        """Returns the exponentials per second: MUFU makes 16 per clock and multiprocessor."""
        return 16 * self.clock * self.multiprocessors


GPUS = {
    gpu.name: gpu
    for gpu in (
        #   name      arch      table     SMs  clock    tensor      memory      L2
        Gpu("H200", "sm_90", "sm_90", 132, 1.83e9, 989 * TERA, 4.80 * TERA, 50 * MEGA,
            copy=0.88, gemm=0.79, own=0.74, mma_sync=0.36),
        Gpu("H100", "sm_90", "sm_90", 132, 1.83e9, 989 * TERA, 3.35 * TERA, 50 * MEGA,
            copy=0.88, gemm=0.79, own=0.74, mma_sync=0.36),
        Gpu("A100", "sm_80", "sm_80", 108, 1.41e9, 312 * TERA, 2.04 * TERA, 40 * MEGA,
            copy=0.88, gemm=0.80, own=0.80, mma_sync=0.80),
        Gpu("RTX 4090", "sm_89", "sm_86", 128, 2.52e9, 165 * TERA, 1.01 * TERA, 72 * MEGA,
            copy=0.92, gemm=0.88, own=0.85, mma_sync=0.85),
        Gpu("B200", "sm_100", "sm_100", 148, 1.85e9, 2250 * TERA, 8.00 * TERA, 126 * MEGA,
            copy=0.88, gemm=0.75, own=0.60, mma_sync=0.18),
        Gpu("RTX 5090", "sm_120", "sm_120", 170, 2.41e9, 209.5 * TERA, 1.79 * TERA, 96 * MEGA,
            copy=0.92, gemm=0.88, own=0.85, mma_sync=0.85),
    )
}  # fmt: skip


class Host(NamedTuple):
    """Says what the host spends on each launch, in microseconds."""

    triton: float  # a launch, with the Python around it
    torch: float  # an operation of PyTorch from Python, with its node of autograd and its views
    cpp: float  # an operation or a launch from C++


# fitted to the twelve eager steps that were measured on the machine with the H200, which it meets
# within 40 %. Steps with fewer launches took 1.4 to 3.5 times as long as it says
HOST = Host(triton=90.0, torch=37.0, cpp=13.0)
# between the end of a kernel and the start of the next in a graph, or where the host is ahead
GAP = 0.35e-6
