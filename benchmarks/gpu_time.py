# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Times steps on a GPU: eager, as a CUDA graph, the host's share, memory, and every kernel.

python -m benchmarks.gpu_time triton 1024,1000000,512
python -m benchmarks.gpu_time --ceilings
python -m benchmarks.gpu_time --peer "torch.compile autocast" 256,100000,512
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marginkernels import ArcFace, MarginSoftmaxHead, margin_cross_entropy, optim

from . import peaks
from .contenders import MARGIN, SCALE, Shape, contenders, problem
from .gpu_kernels import print_table
from .timing import CANNOT_RUN, first_line

REPEATS = 10
COMPILED_CLASSES = 65_536  # enough for every kernel that more classes launch


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_time", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ceilings", action="store_true", help="copies and products of matrices")
    what.add_argument("--peer", help="a contender of benchmarks.head")
    what.add_argument("--compile", action="store_true", help="one small step, nothing timed")
    what.add_argument("--steps", type=int, help="so many steps, nothing timed")
    parser.add_argument("words", nargs="*", help="backend, shapes N,C,D, type of the weights")
    options = parser.parse_args()
    if options.ceilings:
        print_ceilings()
    elif options.peer:
        for word in options.words:
            time_peer(options.peer, shape_of(word))
    elif options.compile or options.steps:
        backend, word, dtype = options.words
        shape = shape_of(word)
        if options.compile:
            shape = shape._replace(c=min(shape.c, COMPILED_CLASSES))
        for call in steps(shape, getattr(torch, dtype), backend).values():
            for _ in range(options.steps or 1):
                call()
        torch.cuda.synchronize()
    else:
        backend, *words = options.words
        for word in words:
            for dtype in (torch.float32, torch.bfloat16):
                time_backend(backend, shape_of(word), dtype)


def shape_of(word: str) -> Shape:
    """Reads N,C,D."""
    return Shape(*map(int, word.split(",")))


def steps(shape: Shape, dtype: torch.dtype, backend: str) -> dict[str, Callable[[], object]]:
    """Returns what is timed: forward and backward, and the same with SGD inside backward."""
    settings: dict[str, Any] = dict(
        margin=ArcFace(MARGIN), scale=SCALE, compute_dtype=torch.bfloat16, backend=backend,
        save_tiles=False,
    )  # fmt: skip
    x, w, y = problem(shape, "cuda")
    head = MarginSoftmaxHead(shape.d, shape.c, device="cuda", dtype=dtype, **settings)
    with torch.no_grad():
        head.weight.copy_(w)

    def gradients() -> tuple[Tensor, ...]:
        loss = margin_cross_entropy(x, head.weight, y, **settings)
        return loss, *torch.autograd.grad(loss, (x, head.weight))

    @functools.cache
    def optimizer() -> optim.SGD:
        return optim.SGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def whole() -> None:
        optimizer()
        head(x, y).backward()
        optimizer().step()
        x.grad = None

    return {"loss and gradients": gradients, "with SGD in backward": whole}


def time_backend(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    """Prints times, memory and kernels for a shape and a type of the weights."""
    for name, call in steps(shape, dtype, backend).items():
        title = f"{backend} {tuple(shape)} {str(dtype).removeprefix('torch.')} weights, {name}"
        try:
            row = measured(call)
            graph = "gradients" in name
            row["graph_ms"] = as_graph(call) if graph else None  # steps inside backward refuse one
        except Exception as error:  # the other steps are still worth their time
            print(f"{title}: FAILED: {first_line(error)}", flush=True)
            continue
        say = {k: "-" if v is None else round(v, 3) for k, v in row.items()}
        print(f"{title}:", *(f"{k} {v}" for k, v in say.items()), flush=True)
        kernels = print_table(call, backend, shape, dtype, in_backward="SGD" in name)
        settings = dict(backend=backend, shape=shape, weights=str(dtype), step=name)
        print("@row", json.dumps(settings | row | {"kernels": kernels}), flush=True)
        torch.cuda.empty_cache()


def measured(call: Callable[[], object]) -> dict[str, float | None]:
    """Returns the time of a step, what the host takes for it, and peak memory beyond before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    host = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    return {"eager_ms": milliseconds(call), "host_ms": median(host), "peak_MiB": extra}


def as_graph(call: Callable[[], object]) -> float | None:
    """Returns the time of a replay, or None where a step cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print("  no graph:", first_line(error))
        return None
    return milliseconds(graph.replay)


def milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Returns the median time of a call on the GPU."""
    for _ in range(3):
        call()
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return median([start.elapsed_time(end) for start, end in events])


def median(numbers: list[float]) -> float:
    """Returns the upper median."""
    return sorted(numbers)[len(numbers) // 2]


def time_peer(name: str, shape: Shape) -> None:
    """Prints the time of forward and backward of a contender, and its peak memory."""
    (peer,) = (c for c in contenders("auto") if c.name == name)
    x, w, y = problem(shape, "cuda")
    try:
        row = measured(lambda: torch.autograd.grad(peer.loss(x, w, y), (x, w)))
    except CANNOT_RUN as error:
        print(f"{name} {tuple(shape)}: FAILED: {first_line(error)}", flush=True)
        return
    print(f"{name} {tuple(shape)}:", *(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    print("@row", json.dumps(dict(peer=name, shape=shape) | row), flush=True)


def print_ceilings() -> None:
    """Prints what the memory and the vendor's products reach."""
    probes, _ = peaks.probes("cuda")
    for name, probe in probes.items():
        best = max(probe() for _ in range(3))
        unit = "GB/s" if name in peaks.MEMORY else "GFLOP/s"
        print(f"{name}: {best:.0f} {unit}", flush=True)
        print("@row", json.dumps({"ceiling": name, "value": best, "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
