# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures time and memory of the head alone, fused and plain, on the same operands."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marginkernels import ArcFace, margin_cross_entropy
from marginkernels.testing import plain_margin_cross_entropy

HEADS = ("fused", "torch")
ROUNDS = 30


class Operands(NamedTuple):
    """Holds what a head gets in one step."""

    x: Tensor  # (N, D) embeddings
    w: Tensor  # (C, D) class weights
    y: Tensor  # (N,) labels
    margin: float
    scale: float
    backend: str  # of the fused head


def step(head: str, operands: Operands) -> None:
    """Runs the head forward and backward, with gradients for embeddings and weights."""
    x, w, y, margin, scale, backend = operands
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    settings: dict[str, Any] = {"margin": ArcFace(margin), "scale": scale}
    if head == "fused":
        loss = margin_cross_entropy(x, w, y, **settings, backend=backend)
    else:
        loss = plain_margin_cross_entropy(x, w, y, **settings)
    loss.backward()


def milliseconds(operands: Operands) -> dict[str, float]:
    """Returns the median time of a step of each head. They take turns on the same machine."""
    times: dict[str, list[float]] = {head: [] for head in HEADS}
    for _ in range(ROUNDS):
        for head in HEADS:
            start = time.perf_counter()
            step(head, operands)
            times[head].append(1e3 * (time.perf_counter() - start))
    return {head: statistics.median(values) for head, values in times.items()}


def peak_mib(operands: Operands) -> dict[str, float]:
    """Returns the peak memory of a step of each head beyond x, w and their gradients, in MiB.

    Each head runs in a fresh process, where nothing freed earlier can hide what it needs, and large
    blocks go back to the system when freed. The process resets the kernel's record of its peak
    resident memory (Linux: VmHWM) just before the step and reads it just after.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operands.pt"
        torch.save(tuple(operands), path)
        return {
            head: float(
                subprocess.run(
                    [sys.executable, __file__, head, str(path)],
                    env=environment,
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
            )
            for head in HEADS
        }


def resident_kib(field: str) -> int:
    """Returns a field of the kernel's record of this process: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def peak_in_this_process(head: str, operands: Operands) -> float:
    """Measures one head; see :func:`peak_mib`."""
    # a few rows and classes load the code and start the threads before the count begins
    step(head, operands._replace(x=operands.x[:8], w=operands.w[:64], y=operands.y[:8] % 64))
    before = resident_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(head, operands)
    gradients = operands.x.nbytes + operands.w.nbytes
    return (resident_kib("VmHWM") - before) / 1024 - gradients / 2**20


if __name__ == "__main__":
    print(peak_in_this_process(sys.argv[1], Operands(*torch.load(sys.argv[2]))))
