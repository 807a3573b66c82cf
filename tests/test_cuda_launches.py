# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the launch plan of the CUDA backend: how many launches a step takes, and their grids.

Fibers execute the launches; sizes of chunks are 1/4096 of those on a GPU.
"""

import ctypes
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from marginkernels import ArcFace, margin_cross_entropy, sweep
from tests.emulation import host, simulate

BF16, F32 = torch.bfloat16, torch.float32
MIB = 1 << 20
SWEEPS = r"marginkernels::head_(fwd|bwd)_.*"
# ATen's ops that launch a kernel on a GPU; its products copy operands on the host alone
LAUNCHING = (
    "aten::mm",
    "aten::addmm",
    "aten::zero_",
    "aten::fill_",
    "aten::sort",
    "aten::mul_",
    "aten::copy_",
)


def function(name: str, count: int) -> Callable[..., int]:
    """Returns a function of operands.h, of so many integers."""
    found = getattr(host.load(), f"_ZN13marginkernels4cuda{len(name)}{name}E{'l' * count}")
    found.argtypes, found.restype = [ctypes.c_int64] * count, ctypes.c_int64
    return found


def number(name: str) -> int:
    """Returns a number of MiB that a file of the schedule names."""
    texts = [path.read_text() for path in (host.ROOT / "csrc" / "cuda").glob("*.*")]
    (found,) = re.findall(rf"\b{name} = (\d+) \* kMiB", "".join(texts))
    return int(found) * MIB


def step(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Computes a loss and its gradients."""
    loss = margin_cross_entropy(
        x, w, y, margin=ArcFace(0.3), scale=32.0, backend=host.NAME, save_tiles=False
    )
    loss.backward()


class Plan(NamedTuple):
    """Counts the launches of a step inside its two sweeps, and the chunks of these."""

    launches: int
    forward: int
    backward: int


def plan_of(n: int, c: int, d: int, w_dtype: torch.dtype) -> Plan:
    """Takes a step and counts."""
    torch.manual_seed(0)
    x = torch.randn(n, d, dtype=BF16).requires_grad_()
    w = torch.randn(c, d, dtype=w_dtype).requires_grad_()
    y = torch.randint(0, c, (n,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        simulate.recorded() as launches,
        torch.autocast("cpu", dtype=BF16),
        torch.profiler.profile(activities=activities) as seen,
    ):
        step(x, w, y)
    stack = [e for e in seen.events() if re.fullmatch(SWEEPS, e.name)]
    assert len(stack) == 2
    by_aten = 0
    while stack:
        event = stack.pop()
        by_aten += event.name in LAUNCHING
        if event.name not in ("aten::mm", "aten::addmm", "aten::to"):
            stack += event.cpu_children
    forward, backward = (
        sum(f"{kernel}_kernel" in launch.symbol for launch in launches)
        for kernel in ("statistics", "gradient")
    )
    around = [each for each in launches if re.search("loss_kernel|held_kernel", each.symbol)]
    return Plan(by_aten + len(launches) - len(around), forward, backward)


@pytest.fixture(autouse=True)
def executed():
    with host.executed():
        yield


@pytest.mark.parametrize("w_dtype", [F32, BF16])
def test_a_step_takes_few_launches(w_dtype, monkeypatch):
    """Counts those of one chunk, as at (256, 100,000), and of each more, up to (1024, 10^6)."""
    assert plan_of(20, 40, 64, w_dtype).launches <= 14
    monkeypatch.setattr(sweep, "_ROUNDED_BYTES", 0)  # a million rounded rows are not kept
    one, several = (plan_of(20, c, 64, w_dtype) for c in (40, 3000))
    assert one.forward == one.backward == 1 and several.backward > 2
    of_forward, of_backward = (2, 5) if w_dtype == F32 else (0, 4)  # launches of a chunk

    def planned(forward: int, backward: int) -> int:
        return one.launches + of_forward * (forward - 1) + of_backward * (backward - 1)

    assert several.launches == planned(several.forward, several.backward)

    n, c, d = 1024, 10**6, 512
    class_bytes = 2 * n + (2 if w_dtype == F32 else 4) * d  # G, and rounded w or raw dw
    chunk = function("chunk_of", 3)
    backward = -(-c // chunk(c, number("kBackwardChunkBytes"), class_bytes))
    forward = -(-c // chunk(c, number("kWChunkBytes"), 2 * d)) if w_dtype == F32 else 1
    assert planned(forward, backward) <= 45


@pytest.mark.parametrize("multiprocessors", [84, 108, 128, 132, 148, 170])
def test_waves_of_blocks_are_nearly_full(multiprocessors):
    """Counts whole waves of blocks, and class tiles of the longest block, for a million."""
    columns_of = function("columns_of", 3)
    slots, class_tiles = 2 * multiprocessors, -(-(10**6) // 128)
    for tile_rows in (64, 128):
        for row_tiles in range(1, 65536 // tile_rows + 1):
            columns = columns_of(slots, row_tiles, class_tiles)
            waves = -(-row_tiles * columns // slots)
            time = waves * -(-class_tiles // columns)
            assert row_tiles * class_tiles / slots / time >= 0.93, row_tiles
    assert columns_of(slots, 0, 0) == 1
