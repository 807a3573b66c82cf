# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Predicts a step: what it launches, and how long each kernel and the host take."""

from typing import NamedTuple

import torch

from .. import traffic
from . import code, native, timing
from .code import Code
from .gpus import GAP, GPUS, HOST, Gpu
from .recording import Launch, Shape, Step, record

LAUNCHES = {"triton": record, "native": native.listed}


class Row(NamedTuple):
    """Holds the prediction for all launches of one kernel in a step."""

    name: str
    calls: int
    ms: float
    bytes: int  # to and from memory
    flops: int


class Prediction(NamedTuple):
    """Holds the prediction for a step."""

    rows: list[Row]
    gpu_ms: float  # the kernels, and the gaps between them
    host_ms: float  # Python and C++ until everything is launched
    launches: int
    bytes: int

    @property
    def eager_ms(self) -> float:
        """Returns the time of a step that is no graph: the slower of host and GPU."""
        return max(self.gpu_ms, self.host_ms)


def predict(
    shape: tuple[int, int, int],
    weights: torch.dtype = torch.float32,
    backend: str = "triton",
    gpu: str = "H200",
) -> list[Row]:
    """Returns the prediction for each kernel of forward and backward, the longest first."""
    return predict_step(shape, weights, backend, gpu).rows


def predict_step(
    shape: tuple[int, int, int],  # N, C, D
    weights: torch.dtype = torch.float32,
    backend: str = "triton",
    gpu: str = "H200",
    optimizer: str = "",
) -> Prediction:
    """Returns the prediction for a step with bf16 arithmetic.

    Args:
        shape: rows of the batch, classes, features.
        weights: their type.
        backend: "triton" or "native".
        gpu: a name of gpus.GPUS.
        optimizer: "" for none, "SGD" with momentum after backward, or "fused" into it.
    """
    if backend not in LAUNCHES:
        raise ValueError(f"backend: expected one of {list(LAUNCHES)}, got {backend!r}")
    card = GPUS[gpu]
    return of_step(LAUNCHES[backend](Shape(*shape), weights, card, optimizer), card)


def of_step(step: Step, gpu: Gpu, codes: dict[str, Code] | None = None) -> Prediction:
    """Returns the prediction for the launches of a step; ``codes`` are in the place of today's."""
    codes = code.known() if codes is None else codes
    total: dict[str, Row] = {}
    for launch, calls in step.launches.items():
        old = total.get(launch.name, Row(launch.name, 0, 0.0, 0, 0))
        total[launch.name] = Row(
            launch.name,
            old.calls + calls,
            old.ms + 1e3 * calls * timing.seconds(launch, gpu, counts(launch, gpu, codes)),
            old.bytes + calls * (launch.read + launch.written),
            old.flops + calls * launch.flops,
        )
    rows = sorted(total.values(), key=lambda row: -row.ms)
    launches = sum(step.launches.values())
    by = {kind: sum(n for k, n in step.launches.items() if k.host == kind) for kind in HOST._fields}
    host = sum(getattr(HOST, kind) * n for kind, n in by.items())
    gpu_ms = sum(row.ms for row in rows) + 1e3 * GAP * launches
    return Prediction(rows, gpu_ms, 1e-3 * host, launches, sum(row.bytes for row in rows))


def counts(launch: Launch, gpu: Gpu, codes: dict[str, Code]) -> Code | None:
    """Returns the instruction counts of a launch's kernel, or None where it has no such kernel."""
    if launch.host == "cpp":
        return native.CODE.get(launch.name)
    if launch.host != "triton" or launch.name not in traffic.KERNELS:
        return None  # an operation of PyTorch, or a kernel on N numbers
    place = code.key(gpu.arch, launch.name, launch.tile or "")
    if place not in codes:
        raise RuntimeError(f"{place}: its counts are missing: run python -m tools.model --compile")
    return codes[place]
