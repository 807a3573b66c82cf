# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles the CUDA kernels with the C++ compiler alone, and runs them on CPU tensors.

Every CUDA thread is a fiber (fibers.h); the result is one more backend. CUDA_HOST_SANITIZE=1
compiles with address sanitizer, for processes with `sanitizer_environment()`.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from marginkernels import backends

NAME = "cuda_host"
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SANITIZE = os.environ.get("CUDA_HOST_SANITIZE") == "1"
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-x", "c++"]

SANITIZED = ["-O1", "-g", "-fsanitize=address"]

NINJA_FILE = """\
rule compile
  command = {compiler} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} {link_flags} -shared $in {libraries} -o $out
"""


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    compiler = os.environ.get("CXX", "g++")
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def build(name: str, sources: list[Path], with_torch: bool, sanitize: bool = SANITIZE) -> Path:
    """Builds a shared library from CUDA sources, and compiles only changed ones again."""
    folder = ROOT / "build" / (name + "_sanitized" * sanitize)
    folder.mkdir(parents=True, exist_ok=True)
    flags, libraries = [*FLAGS, *(SANITIZED if sanitize else ["-O2"])], []
    flags += [f"-include {HERE / 'fibers.h'}", f"-I{ROOT / 'csrc'}"]
    if with_torch:
        flags += [f"-isystem {path}" for path in cpp_extension.include_paths()]
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        flags += [f"-DBUILT_FOR_TORCH={torch.__version__}"]  # another one: compile all again
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-lc10", "-ltorch_cpu"]
    text = NINJA_FILE.format(
        compiler=os.environ.get("CXX", "g++"),
        flags=" ".join(flags),
        link_flags="-fsanitize=address" * sanitize,
        libraries=" ".join(libraries),
    )
    objects = [f"{source.name}.o" for source in sources]
    lines = [f"build {o}: compile {s}" for o, s in zip(objects, sources, strict=True)]
    lines += [f"build {name}.so: link {' '.join(objects)}", f"default {name}.so", ""]
    _write(folder / "build.ninja", text + "\n".join(lines))
    with open(folder / "lock", "w") as lock:  # another test run may build too
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["ninja", "-j2", "-C", str(folder)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{name} does not compile:\n{done.stdout}{done.stderr}")
    if "warning:" in done.stdout:
        print(done.stdout, file=sys.stderr)
    return folder / f"{name}.so"


def sanitizer_environment() -> dict[str, str]:
    """Returns the environment for a process that loads a library with address sanitizer."""
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for library in ("libasan.so", "libstdc++.so")
    ]
    # Python itself leaks
    return dict(LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")


def _write(path: Path, text: str) -> None:
    """Writes only where the text changed, so that nothing else is compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library of the CUDA kernels; loading it registers them."""
    folder = ROOT / "csrc" / "cuda"
    # as one source, since ATen's headers take most of the time
    schedule = ROOT / "build" / "cuda_host_schedule.cpp"
    included = [f'#include "cuda/{path.name}"\n' for path in sorted(folder.glob("*.cpp"))]
    _write(schedule, "".join(included))
    library = build(NAME, [*sorted(folder.glob("*.cu")), HERE / "host.cpp", schedule], True)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


class CudaHostBackend(backends.Backend):
    """Runs the CUDA kernels on CPU tensors, as the backend "cuda_host"."""

    name = NAME
    priority = 0  # backend="auto" never takes it
    updates = True
    fuses_rows = True

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Returns none."""
        return []

    def register_kernels(self) -> None:
        """Builds and loads the library."""
        load()

    def tiles_shape(self, n: int, c: int) -> tuple[int, int]:
        """Returns the shape that the native backend has."""
        return backends.get("native").tiles_shape(n, c)

    def keeps_rounded(self, device: torch.device, d: int) -> bool:
        """Says what the native backend says of a GPU."""
        return backends.get("native").keeps_rounded(torch.device("cuda"), d)


@contextlib.contextmanager
def executed() -> Iterator[None]:
    """Makes ``backend="cuda_host"`` run inside this context."""
    if reason := why_not():
        pytest.skip(reason)
    with backends.registered(CudaHostBackend()):
        yield


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Shows launchers ``count`` multiprocessors inside this context."""
    number = ctypes.c_int.in_dll(load(), "_ZN6fibers15multiprocessorsE")
    before = number.value
    number.value = count
    try:
        yield
    finally:
        number.value = before
