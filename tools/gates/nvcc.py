# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles CUDA kernels by nvcc, for GPUs that are not here."""

import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not installed"


def compile_as(form: str, source: Path | str, target: str) -> bytes:
    """Compiles a file of kernels, or their text, to "ptx" or "cubin" with the extension's flags."""
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["NVCC_FLAGS"]
    flags = [flag for flag in flags if not flag.startswith("--threads")]
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, str):
            text, source = source, Path(folder, "kernels.cu")
            source.write_text(text)
        out = Path(folder, "out")
        command = ["nvcc", f"-{form}", f"-arch={target}", "-std=c++17", *flags, str(source)]
        command += [f"-I{ROOT / 'csrc'}", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr.strip() or done.stdout.strip()}")
        return out.read_bytes()


def instances(kernels: list[str]) -> str:
    """Returns the source text of some kernels alone, since all that may be launched take minutes.

    Kernels are named as in C++, with the types of their arguments.
    """
    includes = [f'#include "cuda/{path.name}"' for path in sorted(KERNELS.glob("*.cuh"))]
    named = [f"template __global__ void {kernel};" for kernel in kernels if "<" in kernel]
    return "\n".join([*includes, "namespace marginkernels::cuda {", *named, "}", ""])


def demangled(symbols: list[str]) -> list[str]:
    """Returns C++ names with the types of the arguments and without the type of the result."""
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    return [name.removeprefix("void ") for name in done.stdout.splitlines()]
