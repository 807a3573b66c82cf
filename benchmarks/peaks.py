# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures what this machine can do at best, in the same run as the contenders."""

import ctypes
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .timing import ms, stamp

GEMM_SIZE = 2048
GPU_GEMM_SIZE = 8192  # enough for all multiprocessors, and for a launch not to count
SMALLER_GEMM_SIZES = (256, 512, 1024)
ENOUGH_SECONDS = 0.02  # for a measurement of a peak
COPY_BYTES = 256 << 20
ROOFS = {"fp32": "fma", "bf16": "bf16 dot"}  # the peak of the cores by compute type
MEMORY = ("copy", "read")  # whichever moves more bytes is the peak of memory

Probe = Callable[[], float]


def probes(device: str) -> tuple[dict[str, Probe], dict[str, str]]:
    """Returns functions that measure one peak each, and the reason for those that are missing.

    "fma" and "bf16 dot": multiply-adds in registers, GFLOP/s, CPU only; where dot products of bf16
    numbers are slower than fp32 multiply-adds, "bf16 dot" is these. "gemm fp32", "gemm bf16":
    torch.mm of square matrices, GFLOP/s. "copy": bytes read and written, GB/s. "read": bytes
    added up, GB/s.
    """
    found: dict[str, Probe] = {
        "gemm fp32": _gemm(torch.float32, device),
        "gemm bf16": _gemm(torch.bfloat16, device),
        "copy": _copy(device),
        "read": _read(device),
    }
    if device != "cpu":
        return found, dict.fromkeys(ROOFS.values(), "measured on the CPU only")
    try:
        loops = _compile_loops()
    except (OSError, subprocess.CalledProcessError) as error:
        return found, dict.fromkeys(ROOFS.values(), f"peak.cpp does not compile: {error}")
    threads = torch.get_num_threads()
    found["fma"] = lambda: loops.fma_gflops(threads)
    if math.isnan(loops.bf16_gflops(1)):
        return found, {"bf16 dot": "this CPU or compiler has no AVX512-BF16"}
    found["bf16 dot"] = lambda: max(loops.bf16_gflops(threads), loops.fma_gflops(threads))
    return found, {}


def _compile_loops() -> ctypes.CDLL:
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", "-pthread"]
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))  # stays mapped when the file is gone
    for loop in (loops.fma_gflops, loops.bf16_gflops):
        loop.argtypes, loop.restype = [ctypes.c_int], ctypes.c_double
    return loops


def _gemm(dtype: torch.dtype, device: str) -> Probe:
    """Measures torch.mm of large squares, or on a CPU of smaller ones where it is slow.

    Without instructions for the type torch.mm falls back to a loop that is a thousand times slower.
    """
    if device != "cpu":
        return _square_gemm(GPU_GEMM_SIZE, dtype, device)
    for size in SMALLER_GEMM_SIZES:
        probe = _square_gemm(size, dtype, device)
        probe()
        if 2 * size**3 * 1e-9 / probe() > ENOUGH_SECONDS:
            return probe
    return _square_gemm(GEMM_SIZE, dtype, device)


def _square_gemm(size: int, dtype: torch.dtype, device: str) -> Probe:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device) * 1e-9


def _copy(device: str) -> Probe:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), device) * 1e-9


def _read(device: str) -> Probe:
    source = torch.ones(COPY_BYTES // 4, device=device)
    return lambda: COPY_BYTES / _seconds(source.sum, device) * 1e-9


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        run()  # so that the launch of the next one is not waited for
    start = stamp(device)
    run()
    end = stamp(device)
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e-3 * ms(start, end)
