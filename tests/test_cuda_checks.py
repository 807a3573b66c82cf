# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The checks of the CUDA kernels find what they are for: bugs planted in a small kernel, one of
each kind, under the fibers, in the PTX simulator and in the gate.
"""

import ctypes
import functools
import re
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import host, nvcc

TOY = Path(__file__).parent / "cuda" / "toy.cu"
BUGS = (
    "none",
    "missing barrier",
    "missing wait",
    "missing mask",
    "divergent barrier",
    "missing lane",
    "unfinished copies",
    "overrun",
    "bank conflicts",
    "spills",
)  # in the order of toy.cu
ROWS, TILE, STAGES = 700, 128, 3


@functools.cache
def operands():
    """Rows, with others behind them that are not the kernel's to read, and the right results."""
    numbers = np.random.default_rng(0).integers(0, 2**32, (ROWS + TILE, 4), dtype=np.uint32)
    padded = np.where(np.arange(len(numbers))[:, None] < ROWS, numbers, 0)
    thread, m = np.arange(TILE)[:, None], np.arange(4)
    row, word = TILE - 1 - (thread // 32 * 32 + 8 * m + thread % 32 // 4), thread % 4
    sums = np.zeros((TILE, 4), dtype=np.uint32)
    for first in range(0, ROWS, TILE):
        sums = sums * np.uint32(3) + padded[first + row, word]
    sums[:, 3] += sums[np.arange(TILE) ^ 1, 2]
    return numbers, sums


def shared_bytes(bug):
    return STAGES * TILE * (128 if bug == "bank conflicts" else 16)


@pytest.fixture(scope="module")
def toy():
    if reason := host.why_not():
        pytest.skip(reason)
    library = ctypes.CDLL(str(host.build("cuda_toy", [TOY], with_torch=False)))
    library.run_toy.restype = ctypes.c_char_p
    return library.run_toy


@pytest.mark.parametrize(
    "bug, complaint",
    [
        ("none", None),
        ("bank conflicts", None),
        ("missing barrier", "wrong"),
        ("missing wait", "wrong"),
        ("missing mask", "wrong"),
        ("divergent barrier", "exits before others|of the block have exited"),
        (
            "missing lane",
            "exits before .* at shuffle|shuffle: lanes of the warp have",
        ),
        ("unfinished copies", "asynchronous copies that it did not wait for"),
        ("overrun", "expected 16 aligned bytes within 6144"),
    ],
)
def test_fibers(bug, complaint, toy):
    numbers, expected = operands()
    out = np.zeros_like(expected)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (numbers, out)]
    report = toy(BUGS.index(bug), *pointers, ROWS, shared_bytes(bug)).decode()
    if complaint not in (None, "wrong"):
        assert report.startswith("toy: block 0 thread ")
        assert re.search(complaint, report)
    else:
        assert report == ""
        assert np.array_equal(out, expected) is (complaint is None)


@functools.cache
def ptx_module():
    simulator = pytest.importorskip("ptxsim", reason="the package ptxsim is not installed")
    if reason := nvcc.why_not():
        pytest.skip(reason)
    return simulator.Module.from_ptx(nvcc.compile_as("ptx", TOY, "sm_80"))


@pytest.mark.parametrize(
    "bug, complaint",
    [
        ("none", None),
        ("missing barrier", "no barrier between"),
        ("missing wait", "still in flight"),
        ("missing mask", "past the end"),
        ("divergent barrier", "no barrier between|barrier"),
        ("missing lane", "have exited"),
        ("overrun", "shared access of 16 bytes at offset"),
    ],
)
def test_ptx_simulator(bug, complaint):
    numbers, expected = operands()
    out = np.zeros_like(expected)

    def launch():
        return ptx_module().launch(
            f"toy<{BUGS.index(bug)}>", grid=1, block=TILE, args=[numbers[:ROWS].copy(), out, ROWS],
            shared_bytes=shared_bytes(bug), checks="strict",
        )  # fmt: skip

    if complaint is None:
        assert not any(launch().bank_conflicts().values())
        assert np.array_equal(out, expected)
    else:
        errors = pytest.importorskip("ptxsim.errors")
        with pytest.raises(errors.SimError, match=complaint):
            launch()
