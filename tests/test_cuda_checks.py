# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that the checks of the CUDA kernels find the bugs that they are for.

A small kernel has one planted bug of each kind; it runs under the fibers, in the PTX simulator and
through the gate.
"""

import ctypes
import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.emulation import host
from tools.gates import cuda as gate
from tools.gates import nvcc
from tools.ptxsim import Module, SimError

TOY = Path(__file__).parent / "emulation" / "toy.cu"
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
    """Returns the rows, followed by rows that the kernel must not read, and the right results."""
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


def test_address_sanitizer_finds_a_missing_mask():
    """Reads behind the last row, in a process of its own, which the sanitizer ends."""
    if reason := host.why_not():
        pytest.skip(reason)
    library = host.build("cuda_toy", [TOY], with_torch=False, sanitize=True)
    code = f"""
import ctypes, sys
rows, out = (ctypes.create_string_buffer(16 * count) for count in ({ROWS}, {TILE}))
toy = ctypes.CDLL({str(library)!r}).run_toy
toy(int(sys.argv[1]), rows, out, {ROWS}, {shared_bytes("none")})
"""
    environment = os.environ | host.sanitizer_environment() | dict(PYTHONMALLOC="malloc")
    for bug in ("none", "missing mask"):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, str(BUGS.index(bug))],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode == 0) is (bug == "none"), done.stderr
    assert "heap-buffer-overflow" in done.stderr and "wait_async" in done.stderr


@functools.cache
def ptx_module():
    if reason := nvcc.why_not():
        pytest.skip(reason)
    return Module.from_ptx(nvcc.compile_as("ptx", TOY, "sm_80"))


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
        with pytest.raises(SimError, match=complaint):
            launch()


def test_ptx_simulator_counts_bank_conflicts():
    numbers, expected = operands()
    out = np.zeros_like(expected)
    stats = ptx_module().launch(
        f"toy<{BUGS.index('bank conflicts')}>", grid=1, block=TILE,
        args=[numbers[:ROWS].copy(), out, ROWS], shared_bytes=shared_bytes("bank conflicts"),
    )  # fmt: skip
    assert np.array_equal(out, expected) and all(n > 0 for n in stats.bank_conflicts().values())


@pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
def test_gate():
    """Judges a kernel that spills, then the right kernel by the rules of other kernels.

    Those must have matrix instructions, or must fit on a multiprocessor more often.
    """
    pytest.importorskip("triton", reason="its wheel brings the tools that read machine code")
    by_bug = {kernel.name: kernel for kernel in gate.kernels_of(TOY, "sm_80")}
    right, spilling = (by_bug[f"toy<{BUGS.index(bug)}>"] for bug in ("none", "spills"))
    assert not gate.problems_of(right)
    assert any("spills" in problem for problem in gate.problems_of(spilling))
    no_mma = right._replace(name="toy<Tile<2, 64>>")
    assert gate.problems_of(no_mma) == ["no matrix instruction"]
    empty = no_mma._replace(load_matrices=0, facts=replace(right.facts, async_copies=0, mma=1))
    assert gate.problems_of(empty) == ["no load of matrices", "no asynchronous copy"]
    narrow = right._replace(name="update_kernel<float, bf16, float, Sgd, 4>", loads={64: 3})
    assert gate.problems_of(narrow._replace(stores={64: 4})) == ["3 loads of 64 bits, 4 planned"]
    for limit in (dict(registers=255, threads=256), dict(shared=100 << 10)):
        (problem,) = gate.problems_of(no_mma._replace(facts=replace(right.facts, mma=1, **limit)))
        assert "1 blocks per multiprocessor, 2 planned" in problem
