# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles CUDA C++ to PTX, demangles names, and asks ptxas."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path


def find_nvcc() -> str:
    """Returns the path of nvcc."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for path in (os.environ.get("NVCC"), shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if path and os.path.exists(path):
            return path
    raise FileNotFoundError("nvcc not found (set NVCC or CUDA_HOME)")


def compile_to_ptx(
    source: str | Path,
    arch: str = "sm_80",
    include_dirs: Iterable[str | Path] = (),
    defines: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> str:
    """Compiles a .cu file, or source text that contains a newline, to PTX text."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = str(source), Path(folder, "out.ptx")
        if "\n" in path:
            text, path = path, str(Path(folder, "kernel.cu"))
            Path(path).write_text(text)
        command = [find_nvcc(), "-ptx", f"-arch={arch}", "-std=c++17", path, "-o", str(out)]
        command += [f"-I{i}" for i in include_dirs] + [f"-D{d}" for d in defines] + list(flags)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        return out.read_text()


def demangle(names: Iterable[str]) -> list[str]:
    """Returns C++ names as they were written, where c++filt is available."""
    names = list(names)
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not names or tool is None:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True)
    plain = done.stdout.splitlines()
    return plain if done.returncode == 0 and len(plain) == len(names) else names


REPORTED = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "shared": r"(\d+) bytes smem",
}


def find_ptxas() -> str:
    """Returns where ptxas should be."""
    beside = os.path.join(os.path.dirname(os.path.realpath(find_nvcc())), "ptxas")
    tool = shutil.which("ptxas") or beside
    if os.path.exists(tool):
        return tool
    return os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "ptxas")


def assemble(ptx: str, arch: str = "sm_80") -> dict[str, dict[str, int]]:
    """Returns registers, spill_stores, spill_loads and shared of each entry, as ptxas reports them.

    Raises RuntimeError when ptxas rejects the PTX: nvcc -ptx does not look inside inline assembly.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        command = [find_ptxas(), "-v", f"-arch={arch}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas rejects the PTX:\n{done.stderr}")
    entries: dict[str, dict[str, int]] = {}
    current = None
    for line in done.stderr.splitlines():
        match = re.search(r"Compiling entry function '([^']+)'", line)
        if match:
            current = entries.setdefault(match.group(1), dict.fromkeys(REPORTED, 0))
        if current is None:
            continue
        for key, pattern in REPORTED.items():
            match = re.search(pattern, line)
            if match:
                current[key] = int(match.group(1))
    return entries
