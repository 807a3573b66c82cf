# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Models the head of plain PyTorch under torch.compile, forward and backward."""

from .gpus import Gpu
from .recording import GEMM, Launch
from .timing import gemm

# bytes that the compiled kernels move beside the GEMMs. Solved from the measured (1024, 1M) and
# (256, 100k) on the H200; (256, 1M), which torch compiled again for any N, takes 1.6 times as long
# as these say
PER_LOGIT, PER_WEIGHT = 19.0, 57.0


def compiled(shape: tuple[int, ...], gpu: Gpu) -> float:
    """Returns ms of forward and backward with fp32 weights and bf16 autocast."""
    n, c, d = shape
    flops, logits, w = 2 * n * c * d, n * c, c * d
    products = [
        Launch("logits", GEMM, 2 * w, 2 * logits, 0, flops),
        Launch("dx", GEMM, 2 * (w + logits), 0, 0, flops),
        Launch("dw", GEMM, 2 * logits, 2 * w, 0, flops),
    ]
    seconds = sum(gemm(product, gpu) for product in products)
    return 1e3 * (seconds + (PER_LOGIT * logits + PER_WEIGHT * w) / gpu.bandwidth)
