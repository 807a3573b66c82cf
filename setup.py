# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Builds marginkernels._C against the torch that is installed; all else is in pyproject.toml.

MARGINKERNELS_EXT=0          builds no extension: an install in pure Python.
MARGINKERNELS_CUDA=auto|0|1  auto builds CUDA kernels where torch is a CUDA build and there is an
                             nvcc of its CUDA's major version. 0 never builds them. 1 builds them,
                             or fails with what is missing.
TORCH_CUDA_ARCH_LIST         names the GPUs to build for, by default all that the kernels are tested
                             for and nvcc knows.
"""

import json
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "marginkernels._C"
# no -march: sources choose instruction sets by pragma and at run time. -fopenmp is for the compiler
# alone: the linker would add a second OpenMP runtime beside the one that torch brings
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-fopenmp"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "--threads=2"]
# machine code for each, and PTX for later GPUs
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDEST_CAPABILITY = (8, 0)
OLDER_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")  # as torch calls them
NO_TORCH = (
    "marginkernels: its C++ extension is built against the torch of the environment that it is "
    "installed in, and there is none: install torch first, pass --no-build-isolation if your tool "
    "builds elsewhere, or set MARGINKERNELS_EXT=0 for an install in pure Python."
)


def setting(name: str, *allowed: str) -> str:
    """Returns an environment variable's value, by default the first that is allowed."""
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def obstacles_to_cuda(torch_cuda: str | None, nvcc: Path | None, files: list[str]) -> list[str]:
    """Returns every reason why the CUDA sources cannot be compiled."""
    found = []
    if not files:
        found.append("there are no CUDA sources (csrc/cuda/*.cu)")
    if torch_cuda is None:
        found.append("this torch is no CUDA build")
    elif nvcc is None or not nvcc.exists():
        found.append("there is no nvcc on PATH or in CUDA_HOME")
    else:
        release = re.search(r"release (\d+)\.\d+", output(nvcc, "--version"))
        if release and release[1] != torch_cuda.split(".")[0]:
            found.append(
                f"{nvcc} is of CUDA {release[0].split()[1]} and torch was built with CUDA "
                f"{torch_cuda}: their major versions have to be the same"
            )
    return found


def buildable(asked: str, known: set[tuple[int, int]]) -> tuple[str, list[str]]:
    """Splits TORCH_CUDA_ARCH_LIST into architectures to build for, and those to leave out.

    The kernels are built for architectures that they and an nvcc with ``known`` support. PTX, where
    it was asked for, goes to the last of them.
    """
    kept, left_out, ptx = [], [], False
    for entry in asked.replace(" ", ";").split(";"):
        number = re.match(r"(\d+)\.(\d+)", entry)
        capability = tuple(map(int, number.groups())) if number else OLDEST_CAPABILITY
        too_new = bool(number and known) and capability not in known
        if capability < OLDEST_CAPABILITY or too_new or entry.startswith(OLDER_NAMES):
            left_out.append(entry)
            ptx |= entry.endswith("+PTX")
        elif entry:
            kept.append(entry)
    if kept and ptx and not kept[-1].endswith("+PTX"):
        kept[-1] += "+PTX"
    return ";".join(kept), left_out


def known_capabilities(nvcc: Path) -> set[tuple[int, int]]:
    """Asks an nvcc for which capabilities it compiles; returns none if it does not say."""
    numbers = re.findall(r"compute_(\d+)(\d)\b", output(nvcc, "--list-gpu-arch"))
    return {(int(major), int(minor)) for major, minor in numbers}


def output(*command: str | Path) -> str:
    """Returns what a command prints on its standard output."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def cuda_headers(site_packages: Path, nvcc: Path) -> list[str]:
    """Returns the folders of CUDA headers, those of torch's wheels first.

    The wheels bring the headers of CUDA's libraries, which a bare toolkit lacks, and the toolkit
    has some that the wheels lack. nvcc, which may be a script elsewhere, says where the toolkit is.
    """
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    toolkit = re.findall(r'^#\$ INCLUDES="-I([^"]+)"', said, re.M)
    return [*map(str, site_packages.glob("nvidia/cu*/include")), *toolkit]


def cuda_plan(
    choice: str, torch_cuda: str | None, cuda_home: str | None, files: list[str]
) -> tuple[str, str]:
    """Returns the architectures to compile the CUDA sources for, and what is left out and why.

    No architectures are "". Exits if CUDA is demanded and cannot be compiled.
    """
    if choice == "0":
        return "", "MARGINKERNELS_CUDA=0"
    nvcc = None if cuda_home is None else Path(cuda_home, "bin", "nvcc")
    obstacles = obstacles_to_cuda(torch_cuda, nvcc, files)
    if nvcc is not None and not obstacles:
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        architectures, left_out = buildable(asked, known_capabilities(nvcc))
        if architectures:
            lacking = ", ".join(left_out)
            return architectures, lacking and f"not for {lacking}: below 8.0, or not in {nvcc}"
        obstacles.append(f"TORCH_CUDA_ARCH_LIST={asked}: all below 8.0, or not in {nvcc}")
    if choice == "1":
        raise SystemExit("MARGINKERNELS_CUDA=1: " + "; ".join(obstacles))
    return "", "; ".join(obstacles)


class BuildWithoutTorch(build_ext):
    """Makes only the attempt to build an error where there is no torch, which no sdist needs."""

    def run(self) -> None:
        """Exits with the ways to give the build its torch."""
        raise SystemExit(NO_TORCH)


def build_command(base: type, torch_version: str, notice: str, left_out: str) -> type:
    """Makes a build command that records what the extension was built for.

    Args:
        base: ``torch.utils.cpp_extension.BuildExtension``.
        notice: a line to print before the build, or "".
        left_out: the CUDA kernels that are left out and why, for the record.
    """

    class Build(base):
        def run(self) -> None:
            self.force = True  # setuptools sees no change of torch or of headers; ninja does
            own = self.distribution.get_version()
            built_for = {"marginkernels": own, "torch": torch_version}
            self.extensions[0].define_macros += [
                (f"BUILT_FOR_{package.upper()}", f'"{version}"')
                for package, version in built_for.items()
            ]
            if notice:
                print(f"marginkernels: {notice}", file=sys.stderr)
            super().run()
            # backends read the record before they load the extension
            record = Path(self.get_ext_fullpath(NAME)).with_name("_C.json")
            record.write_text(json.dumps(built_for | {"left_out": left_out}))

    return Build


def cuda_options(torch_file: str, cuda_home: str, architectures: str) -> dict[str, Any]:
    """Returns the settings of an extension with CUDA kernels, and tells torch the architectures."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    headers = cuda_headers(Path(torch_file).parents[1], Path(cuda_home, "bin", "nvcc"))
    return {"include_dirs": headers, "define_macros": [("MARGINKERNELS_CUDA", None)]}


def extension() -> dict[str, Any]:
    """Returns the arguments by which setup() builds the extension; none without an extension."""
    if setting("MARGINKERNELS_EXT", "1", "0") == "0":
        return {}
    choice = setting("MARGINKERNELS_CUDA", "auto", "0", "1")
    files = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    cuda_files = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        module = Extension(NAME, files + cuda_files)
        return {"ext_modules": [module], "cmdclass": {"build_ext": BuildWithoutTorch}}

    torch_cuda, home = torch.version.cuda, cpp_extension.CUDA_HOME
    architectures, left_out = cuda_plan(choice, torch_cuda, home, cuda_files)
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    if architectures and home is not None:
        options = cuda_options(torch.__file__, home, architectures)
        module = cpp_extension.CUDAExtension(
            NAME, files + cuda_files, extra_compile_args=flags, **options
        )
        module.libraries.remove("cudart")  # torch has loaded its own
    else:
        module = cpp_extension.CppExtension(NAME, files, extra_compile_args=flags)
    notice = ""
    if left_out and torch_cuda:
        kernels = f"CUDA kernels for {architectures}" if architectures else "no CUDA kernels"
        notice = f"{kernels}, {left_out}"
    build = build_command(cpp_extension.BuildExtension, str(torch.__version__), notice, left_out)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


if __name__ == "__main__":
    setup(**extension())
