# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Builds marginkernels._C against the torch that is installed; all else is in pyproject.toml.

MARGINKERNELS_EXT=0          no extension, an install in pure Python
MARGINKERNELS_CUDA=auto|0|1  CUDA kernels where torch is a CUDA build and there is an nvcc; never;
                             or always, failing with what is missing
TORCH_CUDA_ARCH_LIST         for which GPUs, by default all that the kernels are tested for
"""

import json
import os
import re
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "marginkernels._C"
# no -march: sources choose instruction sets by pragma and at run time. -fopenmp is for the compiler
# alone: the linker would add a second OpenMP runtime beside the one that torch brings
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-fopenmp"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "--threads=2"]
# machine code for each, and PTX for what comes later
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
NO_TORCH = (
    "marginkernels: its C++ extension is built against the torch of the environment that it is "
    "installed in, and there is none: install torch first, pass --no-build-isolation if your tool "
    "builds elsewhere, or set MARGINKERNELS_EXT=0 for an install in pure Python."
)


def setting(name: str, *allowed: str) -> str:
    """An environment variable's value, by default the first that is allowed."""
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def wants_cuda(choice: str, torch_cuda: str | None, cuda_home: str | None, files: list) -> bool:
    """Whether to compile the CUDA sources; exits if that is demanded and something is missing."""
    missing = []
    if not files:
        missing.append("CUDA sources (csrc/cuda/*.cu)")
    if torch_cuda is None:
        missing.append("a CUDA build of torch")
    elif cuda_home is None or not Path(cuda_home, "bin", "nvcc").exists():
        missing.append("nvcc (on PATH or in CUDA_HOME)")
    if choice == "1" and missing:
        raise SystemExit("MARGINKERNELS_CUDA=1: missing " + " and ".join(missing))
    return choice != "0" and not missing


def cuda_headers(site_packages: Path, nvcc: Path) -> list[str]:
    """Folders of headers: torch's wheels bring the CUDA libraries', which a bare toolkit lacks, and
    the toolkit has some that the wheels lack; where, nvcc knows, which may be a script elsewhere.
    """
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    toolkit = re.findall(r'^#\$ INCLUDES="-I([^"]+)"', said, re.M)
    return [*map(str, site_packages.glob("nvidia/cu*/include")), *toolkit]


class BuildWithoutTorch(build_ext):
    """An sdist needs no torch, so that only the attempt to build is an error."""

    def run(self) -> None:
        raise SystemExit(NO_TORCH)


def extension() -> dict:
    """What setup() needs to build the extension."""
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

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            self.force = True  # setuptools sees no change of torch or of headers; ninja does
            own = self.distribution.get_version()
            built_for = {"marginkernels": own, "torch": str(torch.__version__)}
            self.extensions[0].define_macros += [
                (f"BUILT_FOR_{package.upper()}", f'"{version}"')
                for package, version in built_for.items()
            ]
            super().run()
            # read before the extension is loaded
            record = Path(self.get_ext_fullpath(NAME)).with_name("_C.json")
            record.write_text(json.dumps(built_for))

    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    if wants_cuda(choice, torch.version.cuda, cpp_extension.CUDA_HOME, cuda_files):
        nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
        headers = cuda_headers(Path(torch.__file__).parents[1], nvcc)
        files += cuda_files
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        macros = [("MARGINKERNELS_CUDA", None)]
        options = dict(include_dirs=headers, extra_compile_args=flags, define_macros=macros)
        module = cpp_extension.CUDAExtension(NAME, files, **options)
        module.libraries.remove("cudart")  # torch has loaded its own
    else:
        module = cpp_extension.CppExtension(NAME, files, extra_compile_args=flags)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extension())
