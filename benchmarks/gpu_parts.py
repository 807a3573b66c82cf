# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists the parts of the report: which processes, in which order, and their shares of the time."""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from .machine import commit

BACKENDS = ("triton", "native")
TYPES = ("float32", "bfloat16", "float16")
NUMERIC = ("head", "hard_cases", "logits", "losses", "transforms", "unchecked", "update")
SHAPES = ("256,100000,512", "256,1000000,512", "1024,1000000,512", "4096,1000000,512")
WEIGHTS = ("float32", "bfloat16")
# kernels whose counters are read, by a part of their names
COUNTED = ("statistics", "gradient", "project", "norm|round|prepare_rows", "nvjet|gemm")
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_shared_mem",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)


class Command(NamedTuple):
    """Holds one process of a part."""

    title: str
    arguments: list[str]
    quiet: bool = False  # its lines are not shown
    env: tuple[tuple[str, str], ...] = ()


Stage = list[Command]  # run together


class Part(NamedTuple):
    """Holds stages that run one after the other, and a share of the time."""

    share: float
    stages: Callable[[], list[Stage]]


def machine() -> dict[str, str]:
    """Returns the device and the versions that numbers depend on."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "no GPU",
        "commit": commit(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "CUDA": str(torch.version.cuda),
    }


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return importlib.import_module(package).__version__


def module(title: str, name: str, *arguments: str, quiet: bool = False) -> Command:
    """Returns the command that runs a module."""
    return Command(title, [sys.executable, "-m", name, *arguments], quiet)


def pytest(title: str, *arguments: str) -> Command:
    """Returns the command that runs tests, in processes where pytest-xdist is there."""
    workers = ["-n", str(os.cpu_count() or 1)] if importlib.util.find_spec("xdist") else []
    quiet = ["-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    quiet += ["-p", "benchmarks.gpu_failures"]
    return module(title, "pytest", *workers, *quiet, *arguments)


def asked(code: str) -> list[str]:
    """Returns the words that a new process prints, which sees an extension that was just built."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.split()


def able() -> list[str]:
    """Returns the backends that can run on the GPU."""
    return asked(
        "from marginkernels.backends import reasons\n"
        f"print(*(name for name in {BACKENDS} if not reasons(name, 'cuda')))"
    )


def build() -> list[Stage]:
    """Compiles the extension for this GPU, if there is none that runs on it."""
    if "native" in able():
        return [[module("there", "marginkernels")]]
    major, minor = torch.cuda.get_device_capability()
    env = (("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"), ("MARGINKERNELS_CUDA", "1"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return [[Command("compile", command, True, env)], [module("built", "marginkernels")]]


def smoke() -> list[Stage]:
    """Compares with fp64 and bits with bits, then runs the tests that are for GPUs."""
    check = "benchmarks.gpu_check"
    numbers = [module(f"{b} {t}", check, b, t) for b in able() for t in TYPES]
    return [numbers, [pytest("behaviour", "tests/test_gpu.py")]]


def sanitize() -> list[Stage]:
    """Looks for accesses out of bounds and for races, on a small shape."""
    small = [sys.executable, "-m", "benchmarks.gpu_check", "--small"]
    # each tensor in memory of its own, so that an access beyond it is seen
    apart = {"memcheck": (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)}

    def under(tool: str, backend: str, dtype: str) -> Command:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command = [*sanitizer, *small, backend, dtype]
        return Command(f"{tool} {backend} {dtype}", command, env=apart.get(tool, ()))

    backends, tools = able(), ("memcheck", "racecheck")
    return [[under(tool, b, dtype) for tool in tools for b in backends for dtype in TYPES[:2]]]


def tests() -> list[Stage]:
    """Runs the tests of numbers."""
    return [[pytest("numbers", "--device", "cuda", *(f"tests/test_{n}.py" for n in NUMERIC))]]


def kernels() -> list[Stage]:
    """Times steps and their kernels; what has to be compiled is compiled together before."""
    time = "benchmarks.gpu_time"
    first = [
        module(f"compile {n} {w}", time, "--compile", "triton", n, w, quiet=True)
        for n in SHAPES
        for w in WEIGHTS
    ]
    timed = [[module(backend, time, backend, *SHAPES)] for backend in able()]
    return [[module("ceilings", time, "--ceilings")], first, *timed]


def tiles() -> list[Stage]:
    """Times the Triton tile kernels by tile, and a step by the size of its chunks."""
    names = asked("from benchmarks import gpu_tiles; print(*gpu_tiles.candidates())")
    compiled = [
        module(f"compile {name}", "benchmarks.gpu_tiles", "--compile", name, quiet=True)
        for name in names
    ]
    sweeps = [[module(kind, "benchmarks.gpu_tiles", kind)] for kind in ("tiles", "chunks")]
    return [compiled, *sweeps]


def peers() -> list[Stage]:
    """Times what people run today, once."""
    names, shapes = ("torch.compile autocast", "eager autocast"), SHAPES[:3]
    time = "benchmarks.gpu_time"
    # compiled for each shape: processes that are not timed fill the compiler's cache together
    first = [module(f"compile {s}", time, "--peer", names[0], s, quiet=True) for s in shapes]
    return [first, *([module(name, time, "--peer", name, *shapes)] for name in names)]


def counters() -> list[Stage]:
    """Reads hardware counters of a launch of each kind of kernel, at the clock that it runs at."""
    step = [sys.executable, "-m", "benchmarks.gpu_time", "--steps", "3"]
    return [
        [
            Command(
                f"{backend} {kernel}",
                ["ncu", "--clock-control", "none", "--kernel-name", f"regex:{kernel}",
                 "--launch-skip", "2", "--launch-count", "1", "--metrics", ",".join(COUNTERS),
                 *step, backend, SHAPES[2], "bfloat16"],
            )
        ]
        for backend in able()
        for kernel in COUNTED
    ]  # fmt: skip


def rest() -> list[Stage]:
    """Runs the other tests of the device, then those of the CPU."""
    ignored = [f"--ignore=tests/test_{name}.py" for name in (*NUMERIC, "gpu")]
    on_gpu = pytest("device", "--device", "cuda", "tests", *ignored)
    return [[on_gpu], [pytest("CPU", "--device", "cpu", "tests")]]


PARTS = {
    "build": Part(250, build),
    "smoke": Part(80, smoke),
    "sanitize": Part(100, sanitize),
    "tests": Part(90, tests),
    "kernels": Part(150, kernels),
    "tiles": Part(120, tiles),
    "peers": Part(100, peers),
    "counters": Part(100, counters),
    "rest": Part(300, rest),
}
