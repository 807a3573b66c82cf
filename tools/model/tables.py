# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes the tables of docs/gpu_model.md, and of what the tool prints."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..gates.machine_code import markdown_table
from . import before, peers, timing
from .code import TILE_KERNELS, Tile, key
from .gpus import GAP, GPUS, HOST
from .recording import GEMM, TILE, Launch
from .step import Prediction, of_step, predict_step

MEASURED = Path(__file__).with_name("h200.json")
CHANGES = Path(__file__).with_name("changes.json")
SHAPES = [(1024, 10**6, 512), (4096, 10**6, 512), (256, 10**6, 512), (256, 10**5, 512)]
WEIGHTS = {"float32": "fp32", "bfloat16": "bf16"}
# GPU, shape, weights and optimizer before and now, and what is to be reached: ms, or a share
GOALS = [
    ("H100", SHAPES[0], ("float32", "SGD"), ("bfloat16", "fused"), 8.0),
    ("H100", SHAPES[2], ("float32", "SGD"), ("bfloat16", "fused"), 3.5),
    ("A100", SHAPES[0], ("float32", "SGD"), ("bfloat16", "fused"), 0.55),
    ("RTX 4090", SHAPES[0], ("float32", "SGD"), ("bfloat16", "fused"), 0.55),
]


@functools.cache
def measured() -> dict[str, Any]:
    """Returns what was measured on one H200 at the commit of before.json."""
    return json.loads(MEASURED.read_text())


@functools.cache
def today(
    shape: tuple[int, ...], weights: str, backend: str, gpu: str, optimizer: str
) -> Prediction:
    """Returns the prediction for a step as it is now."""
    n, c, d = shape
    return predict_step((n, c, d), getattr(torch, weights), backend, gpu, optimizer)


def named(shape: tuple[int, ...]) -> str:
    """Returns (N, C) as the tables write it."""
    n, c, _ = shape
    return f"{n}, " + (f"{c // 10**6}M" if c % 10**6 == 0 else f"{c // 1000}k")


def assumptions() -> list[str]:
    """Returns what is assumed of each GPU."""
    rows = []
    for g in GPUS.values():
        sheet = (
            f"{g.name} | {g.multiprocessors} | {g.clock * 1e-9:.2f} | {g.tensor * 1e-12:.0f} "
            f"| {g.memory * 1e-12:.2f} | {g.l2_size * 1e-6:.0f}"
        )
        shares = f"{g.copy:.2f} | {g.gemm:.2f} | {g.own:.2f} | {g.mma_sync:.2f}"
        rows.append(f"{sheet} | {shares} | {g.l2_bandwidth * 1e-12:.1f}")
    header = (
        "GPU | SMs | GHz | TFLOP/s | TB/s | L2 MB | copy | GEMM | own loop | mma.sync | L2 TB/s"
    )
    return markdown_table(header, rows)


def constants() -> list[str]:
    """Returns the times that are the same on every GPU."""
    rows = [
        f"ramp of a kernel | {timing.RAMP * 1e6:.1f}",
        f"ramp of a GEMM | {timing.GEMM_RAMP * 1e6:.1f}",
        f"gap between kernels in a graph | {GAP * 1e6:.2f}",
        f"wait for memory | {timing.WAIT * 1e6:.1f}",
        f"first copies of a tile that runs alone | {timing.FILL * 1e6:.1f}",
        f"host, a launch of Triton | {HOST.triton:.0f}",
        f"host, an operation of PyTorch | {HOST.torch:.0f}",
        f"host, a launch from C++ | {HOST.cpp:.0f}",
    ]
    return markdown_table("constant | microseconds", rows)


def steps(backend: str) -> list[str]:
    """Returns measured beside modelled times of each kernel, at the commit that was measured."""
    runs = [run for run in measured()["steps"] if run["backend"] == backend]
    models = [
        of_step(before.step(backend, run["shape"], run["weights"]), GPUS["H200"], before.codes())
        for run in runs
    ]
    names = dict.fromkeys(name for run in runs for name in run["kernels"])
    lines = []
    for name in names:
        cells = []
        for run, model in zip(runs, models, strict=True):
            ms = {row.name: row.ms for row in model.rows}.get(name)
            found = run["kernels"].get(name)
            cells.append(_pair(found[1], ms) if found and ms else "")
        lines.append(f"{name} | " + " | ".join(cells))
    whole: list[tuple[str, Callable[[dict], float], Callable[[Prediction], float]]] = [
        ("**graph**", lambda run: run["graph"], lambda model: model.gpu_ms),
        ("host", lambda run: run["host"], lambda model: model.host_ms),
        ("launches", lambda run: run["launches"], lambda model: model.launches),
    ]
    for name, left, right in whole:
        cells = [_pair(left(run), right(model)) for run, model in zip(runs, models, strict=True)]
        lines.append(f"{name} | " + " | ".join(cells))
    heads = (f"{named(run['shape'])}, {WEIGHTS[run['weights']]}" for run in runs)
    return markdown_table("kernel | " + " | ".join(heads), lines)


def _pair(left: float, right: float) -> str:
    digits = 0 if left >= 100 else 2 if left >= 0.1 else 3
    return f"{left:.{digits}f} / {right:.{digits}f} ({right / left:.2f})"


def tiles() -> list[str]:
    """Returns measured beside modelled times of the tile kernels by tile."""
    gpu, lines = GPUS["H200"], []
    for run in measured()["tiles"]:
        n, c, d = run["shape"]
        tile = Tile(*run["tile"])
        cells = []
        for name in TILE_KERNELS:
            # descriptors change nothing after the main loop
            plain = tile._replace(descriptors=False, flatten=False)
            code = before.codes()[key(gpu.arch, name, plain)]
            # statistics took all classes at once, the gradient without descriptors 64 MiB of G
            whole = name == TILE_KERNELS[0] or tile.descriptors
            chunk = c if whole else (64 << 20) // (2 * n)
            launch = _tile_launch(name, (n, chunk, d), tile, run["programs"])
            ms = 1e3 * c / chunk * timing.seconds(launch, gpu, code)
            cells.append(_pair(run[name.removesuffix("_kernel")], ms))
        lines.append(f"{n}, {c} | {tile} | {run['programs']} | " + " | ".join(cells))
    return markdown_table("N, C | tile | programs | statistics | gradient", lines)


def _tile_launch(name: str, shape: tuple[int, int, int], tile: Tile, programs: int) -> Launch:
    n, c, d = shape
    count = -(-n // tile.block_n) * -(-c // tile.block_c)
    flops = 2 * count * tile.block_n * tile.block_c * d
    is_gradient = name != TILE_KERNELS[0]
    persistent = tile.flatten or not is_gradient
    return Launch(
        name, TILE, 2 * c * d, 2 * n * c if is_gradient else 0, 0, flops, 0, tile, count,
        GPUS["H200"].multiprocessors * programs if persistent else count,
    )  # fmt: skip


def gemms() -> list[str]:
    """Returns measured beside modelled times of the vendor's GEMMs over all classes at once."""
    gpu, lines = GPUS["H200"], []
    for run in measured()["gemms"]:
        n, c, d = run["n"], run["classes"], run["d"]
        flops, g, w = 2 * n * c * d, 2 * n * c, 2 * c * d
        cells = []
        for name, read, written in (
            ("logits", w, g), ("dx", g + w, 0), ("dw_fp32", g, 2 * w), ("dw_bf16", g, w),
        ):  # fmt: skip
            launch = Launch(name, GEMM, read, written, 0, flops)
            cells.append(_pair(run[name], 1e3 * timing.seconds(launch, gpu, None)))
        lines.append(f"{n}, {c} | " + " | ".join(cells))
    return markdown_table("N, C | logits | dx | dw in fp32 | dw in bf16", lines)


def predicted_first() -> list[str]:
    """Returns what the model said of changed launches before they were measured."""
    lines = [
        f"{run['backend']} | {named(run['shape'])}, {WEIGHTS[run['weights']]} | {run['modelled']} "
        f"| {run['measured']} | {run['modelled'] / run['measured']:.2f}"
        for run in measured()["predicted_first"]
    ]
    return markdown_table("backend | N, C, weights | modelled | measured | ratio", lines)


def totals(backend: str) -> list[str]:
    """Returns the step of every GPU before and now, with the optimizer; all modelled."""
    lines = []
    for gpu in GPUS:
        for shape in SHAPES:
            cells = [_change(gpu, backend, shape, weights, optimizer) for weights, optimizer in (
                ("float32", "SGD"), ("float32", "fused"), ("bfloat16", "fused"))]  # fmt: skip
            other = f"{peers.compiled(shape, GPUS[gpu]):.1f}"
            lines.append(f"{gpu} | {named(shape)} | " + " | ".join(cells) + f" | {other}")
    header = "GPU | N, C | fp32, SGD after | fp32, fused | bf16, fused | compile without optimizer"
    return markdown_table(header, lines)


def _change(gpu: str, backend: str, shape: tuple[int, ...], weights: str, optimizer: str) -> str:
    old, *_ = before.total(gpu, backend, shape, weights, optimizer)
    return f"{old:.2f} → {today(shape, weights, backend, gpu, optimizer).gpu_ms:.2f}"


def launches(backend: str) -> list[str]:
    """Returns launches, host time and bytes of a step on an H200 before and now."""
    lines = []
    for shape in SHAPES:
        for weights, optimizer in (("float32", ""), ("bfloat16", ""), ("bfloat16", "fused")):
            _, host, count, moved = before.total("H200", backend, shape, weights, optimizer)
            now = today(shape, weights, backend, "H200", optimizer)
            lines.append(
                f"{named(shape)} | {WEIGHTS[weights]}, {optimizer or 'no optimizer'} "
                f"| {count} → {now.launches} | {host:.1f} → {now.host_ms:.1f} "
                f"| {moved * 1e-9:.1f} → {now.bytes * 1e-9:.1f}"
            )
    return markdown_table("N, C | weights, optimizer | launches | host ms | GB", lines)


def kernels(
    gpu: str, backend: str, shape: tuple[int, ...], weights: str, optimizer: str
) -> list[str]:
    """Returns the kernels of one step as it is now."""
    now = today(shape, weights, backend, gpu, optimizer)
    lines = [
        f"{row.name} | {row.calls} | {row.ms:.3f} | {row.bytes * 1e-9:.2f} "
        f"| {row.flops * 1e-9 / row.ms:.0f}"
        for row in now.rows
    ]
    lines.append(f"gaps | {now.launches} | {now.launches * GAP * 1e3:.3f} | | ")
    lines.append(f"**all** | {now.launches} | {now.gpu_ms:.2f} | {now.bytes * 1e-9:.1f} | ")
    return markdown_table("kernel | calls | ms | GB | TFLOP/s", lines)


def goals() -> list[str]:
    """Returns each goal, what the model says today, and whether that is enough."""
    lines = []
    for gpu, shape, then, now, goal in GOALS:
        old, *_ = before.total(gpu, "triton", shape, *then)
        best = min(("triton", "native"), key=lambda b: today(shape, now[0], b, gpu, now[1]).gpu_ms)
        ms = today(shape, now[0], best, gpu, now[1]).gpu_ms
        same = today(shape, then[0], "triton", gpu, "fused").gpu_ms
        limit = goal if goal > 1 else goal * old
        fate = "reached" if ms <= limit else "missed"
        lines.append(
            f"{gpu} | {named(shape)} | {old:.1f} | {same:.1f} | {ms:.1f} ({best}) | {limit:.1f} "
            f"| {fate}"
        )
    return markdown_table(
        "GPU | N, C | before: fp32, SGD after | fp32, fused | bf16, fused | goal | ", lines
    )


def changes() -> list[str]:
    """Returns what each change did: counted launches and bytes, modelled times, on an H200."""
    lines = []
    for change in json.loads(CHANGES.read_text()):
        cells = [
            f"{launches}, {1e-9 * moved:.1f} GB, {gpu:.2f} ms, {host:.1f} ms"
            for gpu, host, launches, moved in change["runs"]
        ]
        lines.append(f"{change['commit']} {change['subject']} | " + " | ".join(cells))
    heads = "1024, 1M, fp32 | 1024, 1M, bf16 | 1024, 1M, bf16 fused | 256, 100k, bf16"
    return markdown_table(f"change | {heads}", lines)
