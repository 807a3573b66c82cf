# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs tests, benchmarks and kernels on a GPU, and writes one report.

    python -m benchmarks.gpu                      # tests, benchmarks, kernels -> gpu_report.txt
    python -m benchmarks.gpu --report FILE --shape 1024 1000000 512

The report has versions, the test suite on the device, every contender against the fused head of
each backend with peak memory, the three GEMMs that no head can do without, and the time of each
kernel. Each part is a process of its own with a time limit: a failure is written down, and the rest
goes on. triton.testing takes the times; it comes with torch's wheels for CUDA.
"""

import argparse
import functools
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from marginkernels import ArcFace, backend_report, margin_cross_entropy

from .contenders import Shape, problem

SHAPES = [(256, 100_000, 512), (1024, 1_000_000, 512)]
ROOT = Path(__file__).parents[1]
BACKENDS = ("triton", "native")
LIMIT_SECONDS = 1800


def main() -> None:
    """Runs all parts, or one."""
    options = parse_options()
    if options.part:
        PARTS[options.part](Shape(*options.shape[0]), *options.backend or ())
        return
    with open(options.report, "w") as report:
        run(report, "versions", part("versions", SHAPES[0]))
        run(report, "driver", ["nvidia-smi"])
        if not options.no_tests:
            run(report, "tests", [sys.executable, "-m", "pytest", "tests", "-q", "-rfE"])
        for shape in options.shape or SHAPES:
            sizes = [str(size) for size in shape]
            run(report, f"gemms {shape}", part("gemms", shape))
            for backend in options.backend or BACKENDS:
                chosen = ["--backend", backend]
                head = [sys.executable, "-m", "benchmarks.head", "--device", "cuda", *chosen]
                run(report, f"head {shape} by {backend}", [*head, "--shape", *sizes])
                kernels = [*part("kernels", shape), *chosen]
                run(report, f"kernels {shape} of {backend}", kernels)
    print(f"written to {options.report}")


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--report", type=Path, default=Path("gpu_report.txt"))
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("N", "C", "D"),
        help="may be repeated",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, action="append", help="may be repeated, default: all"
    )
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process")
    return parser.parse_args()


def part(name: str, shape: tuple[int, int, int]) -> list[str]:
    """Returns the command that runs one part."""
    sizes = [str(size) for size in shape]
    return [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--shape", *sizes]


def run(report: TextIO, title: str, command: list[str]) -> None:
    """Runs a command, and writes its output and fate to the report and the screen."""
    start = time.perf_counter()

    def say(text: str) -> None:
        for stream in (report, sys.stdout):
            stream.write(text)
            stream.flush()

    say(f"\n== {title}: {' '.join(command)}\n")
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT_SECONDS, errors="replace",
        )  # fmt: skip
        say(done.stdout)
        fate = "ok" if done.returncode == 0 else f"FAILED with status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        say(output if isinstance(output, str) else output.decode(errors="replace"))
        fate = f"FAILED: not done after {LIMIT_SECONDS} s"
    except OSError as error:
        fate = f"FAILED: {error}"
    say(f"== {title}: {fate}, {time.perf_counter() - start:.1f} s\n")


def versions(_: Shape) -> None:
    """Prints versions, backends and the device."""
    for package in ("torch", "triton", "marginkernels"):
        try:
            print(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            print(package, "is not installed")
    print("python", sys.version.split()[0], "CUDA", torch.version.cuda, "HIP", torch.version.hip)
    for backend, reasons in backend_report().items():
        print(f"backend {backend}:", "; ".join(reasons) or "available")
    print(torch.cuda.get_device_properties())


def gemms(shape: Shape) -> None:
    """Times the floor of a head that materialises nothing: logits, dx, dw as plain bf16 GEMMs."""
    n, c, d = shape
    x, w = (torch.randn(rows, d, device="cuda", dtype=torch.bfloat16) for rows in (n, c))
    g = torch.randn(n, c, device="cuda", dtype=torch.bfloat16)
    total = 0.0
    for name, a, b in (("logits", x, w.t()), ("dx", g, w), ("dw", g.t(), x)):
        milliseconds = _milliseconds(functools.partial(torch.mm, a, b))
        total += milliseconds
        print(f"{name:<8}{milliseconds:9.3f} ms {2e-9 * n * c * d / milliseconds:9.1f} TFLOP/s")
    print(f"{'sum':<8}{total:9.3f} ms {6e-9 * n * c * d / total:9.1f} TFLOP/s")


def kernels(shape: Shape, backend: str) -> None:
    """Prints time, peak memory and kernels of a step for each setting."""
    x, w, y = problem(shape, "cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for save_tiles in (False, True) if dtype != torch.float16 else (False,):
            for w_dtype in {torch.float32, dtype}:
                name = f"{dtype} compute, {w_dtype} weights, save_tiles={save_tiles}"
                print("\n" + name)
                try:
                    typed = w.detach().to(w_dtype).requires_grad_()
                    _one_setting(x, typed, y, dtype, save_tiles, backend)
                except Exception as error:  # the other settings are still worth running
                    print(f"FAILED: {type(error).__name__}: {error}")
                torch.cuda.empty_cache()


def _one_setting(
    x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, save_tiles: bool, backend: str
) -> None:
    def step() -> tuple[Tensor, ...]:
        loss = margin_cross_entropy(
            x, w, y, margin=ArcFace(0.5), scale=64.0, compute_dtype=dtype, save_tiles=save_tiles,
            backend=backend,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss, (x, w))

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - x.nbytes - w.nbytes
    same = all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    del first
    milliseconds = _milliseconds(step)
    (n, d), c = x.shape, len(w)
    print(
        f"{milliseconds:.3f} ms, {6e-9 * n * c * d / milliseconds:.1f} TFLOP/s as 6NCD, "
        f"{extra / 2**20:.1f} MiB beyond x, w, dx, dw; same bits twice: {same}"
    )
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        print(f"{_milliseconds(graph.replay):.3f} ms as a CUDA graph")
    except Exception as error:
        print(f"CUDA graph FAILED: {error}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20))


def _milliseconds(function: Callable[[], object]) -> float:
    """Returns the median over some runs, with the L2 cache flushed before each."""
    import triton

    return triton.testing.do_bench(function, warmup=100, rep=300, return_mode="median")


PARTS: dict[str, Callable[..., None]] = {"versions": versions, "gemms": gemms, "kernels": kernels}

if __name__ == "__main__":
    main()
