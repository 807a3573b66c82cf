# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests installing, importing and building, each in a process or a copy of its own."""

import json
import os
import re
import runpy
import shutil
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import marginkernels
from marginkernels.backends import native, reasons

ROOT = Path(__file__).parents[1]
PACKAGE = Path(marginkernels.__file__).parent
VERSION = marginkernels.__version__
NATIVE = native.extension
needs_extension = pytest.mark.skipif(NATIVE is None, reason="; ".join(reasons("native")))


def python(*arguments, cwd=ROOT, **environment):
    """Returns the output of a fresh interpreter, which finds packages in ``cwd`` first."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# Collects what a user without the native backend sees: warnings, the report, an error, and a
# gradient from the backends that still work.
IMPORT = """
import json, sys, warnings
import torch
sys.modules["triton"] = None  # an import of it fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import marginkernels as mk
    x, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8), torch.tensor([0, 3, 8, 3])
    def loss(backend):
        return mk.margin_cross_entropy(x, w, y, margin=mk.ArcFace(0.5), scale=16, backend=backend)
    loss("reference").backward()
    loss("auto").backward()
try:
    loss("native")
    error = ""
except RuntimeError as raised:
    error = str(raised)
messages = [str(w.message) for w in caught if "native" in str(w.message)]
print(json.dumps(dict(warnings=messages, report=mk.backend_report(), error=error,
                      x_grad=x.grad.norm().item(), compiler="torch._dynamo" in sys.modules)))
"""


def test_cold_import_without_triton():
    seen = json.loads(python("-c", IMPORT))
    # torch's compiler takes seconds to import, and a plain call needs none of it
    assert seen["x_grad"] > 0 and not seen["compiler"]
    assert seen["report"]["reference"] == []
    assert (seen["error"] == "") == (seen["report"]["native"] == [])


@pytest.mark.parametrize(
    ("torch_version", "reason"),
    [
        (None, "installed without its extension"),
        ("2.9.1+other", f"and torch 2.9.1+other but this is marginkernels {VERSION} and torch"),
        (str(torch.__version__), "the extension does not load: "),
    ],
    ids=["not built", "another torch", "broken"],
)
def test_without_a_usable_extension(torch_version, reason, tmp_path):
    """Expects one message, a reason in the report, and a working reference; never a crash."""
    copy = tmp_path / "marginkernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if torch_version is not None:
        (copy / "_C.json").write_text(
            json.dumps({"marginkernels": VERSION, "torch": torch_version})
        )
        (copy / "_C.so").write_bytes(b"not a library")
    seen = json.loads(python("-c", IMPORT, cwd=tmp_path))
    (why_not,) = seen["report"]["native"]
    assert reason in why_not
    assert why_not in seen["error"]
    # whoever chose an install in pure Python is not reminded of it at each import
    on_import = [] if torch_version is None else [f"no native backend: {why_not}"]
    *first, on_call = seen["warnings"]
    assert first == on_import
    assert on_call.startswith('backend="auto" takes "reference"') and why_not in on_call
    assert seen["x_grad"] > 0


@needs_extension
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_each_cpu_capability(capability):
    """Computes within the budget, or says clearly that the processor lacks it."""
    code = """
import json, torch
from marginkernels.backends import native, reasons
from marginkernels import ArcFace
from tests.support import sweeps
from tests.support.problems import random_problem
why_not = reasons("native")
for types in (torch.float32, torch.float32, None), (torch.float32, torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    problem = random_problem(50, 700, 130, dtypes=types, margin=ArcFace(0.5), scale=30.0)
    exact, plain = problem.solve_exact(), problem.solve_plain()
    for save_tiles in (True, False) if not why_not else ():
        problem.check("native", exact, plain, save_tiles=save_tiles)
    for learns in ("nothing", "bias", "scale") if not why_not else ():
        sweeps.backward_makes_the_logits_of_forward(
            learns, types[2] or types[0], "native", "cpu"
        )
if not why_not:
    sweeps.sum_of_logits_that_a_bias_masks("native", "cpu")
print(json.dumps([why_not, native.extension and native.extension.build_info()["cpu_capability"]]))
"""
    out = python("-W", "ignore", "-c", code, cwd=ROOT, MARGINKERNELS_CPU=capability)
    why_not, in_use = json.loads(out)
    if has(capability):
        assert why_not == []
        assert in_use.removesuffix("_bf16") == capability
    else:
        assert "MARGINKERNELS_CPU" in why_not[0]
        assert f"got '{capability}'" in why_not[0]


def has(capability):
    """Asks the operating system's kernel whether this processor has it."""
    needed = {
        "default": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    return needed[capability] <= set(Path("/proc/cpuinfo").read_text().split())


@needs_extension
def test_unknown_cpu_capability_is_a_reason():
    out = python("-W", "ignore", "-m", "marginkernels", MARGINKERNELS_CPU="sse9")
    assert "unavailable\n    the extension does not load: MARGINKERNELS_CPU: expected one of" in out


def test_command_line_report():
    out = python("-W", "ignore", "-m", "marginkernels")
    assert out.startswith(f"marginkernels {VERSION}, torch {torch.__version__}, Python ")
    for backend, why_not in marginkernels.backend_report().items():
        assert f"  {backend:<26}{'unavailable' if why_not else 'available'}\n" in out
        assert all(f"    {reason}\n" in out for reason in why_not)
    if NATIVE is not None:
        for key, value in NATIVE.build_info().items():
            assert f"  {key:<26}{', '.join(value) if isinstance(value, list) else value}\n" in out


@needs_extension
def test_build_info():
    info = NATIVE.build_info()
    assert list(info) == [
        "marginkernels",
        "torch",
        "compiler",
        "cxx_standard",
        "cpu_capability",
        "cpu_capabilities_compiled",
        "cuda",
        *(["cuda_architectures"] if info["cuda"] else []),
    ]
    assert info["marginkernels"] == VERSION
    assert info["torch"] == torch.__version__
    assert info["cxx_standard"] >= 17
    assert info["cpu_capability"] in info["cpu_capabilities_compiled"]


@needs_extension
def test_exp_agrees_with_numpy():
    x = np.concatenate([np.linspace(-87, 88, 200_001), [0.0, 1e-30, -1e-30]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(NATIVE.math.exp(x) / exact - 1).max() < 1.2e-7
    assert (NATIVE.math.exp(np.float32([-87.01, -1e30, -np.inf])) == 0).all()


@needs_extension
def test_inverse_norm_agrees_with_numpy():
    squares = np.logspace(-36, 36, 1001).astype(np.float32)
    for eps in np.float32([1e-12, 1e-4]):
        exact = 1 / np.maximum(np.sqrt(squares.astype(np.float64)), np.float64(eps))
        error = np.abs(NATIVE.math.inverse_norm(squares, eps) / exact - 1).max()
        assert error < 2 * np.finfo(np.float32).eps


@pytest.fixture
def setup_script(monkeypatch):
    """Loads the functions of setup.py, which is not part of the package."""
    pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    for name in ("MARGINKERNELS_EXT", "MARGINKERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path("setup.py", run_name="setup")


def fake_nvcc(home, release, *capabilities):
    """Writes a CUDA toolkit to ``home``, whose nvcc claims this version and these architectures."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    architectures = " ".join(f"compute_{c.replace('.', '')}" for c in capabilities)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.131' ;;\n"
        f"--list-gpu-arch) printf '%s\\n' {architectures} ;;\n"
        "*) exit 1 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return str(home)


@pytest.fixture
def plan(setup_script, tmp_path, monkeypatch):
    """Returns setup.py's decision for a torch with CUDA, an nvcc and a list of architectures."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def decide(choice="auto", release="12.6", asked=None, torch_cuda="12.6", **other):
        known = ["7.5", "8.0", "8.6", "8.9", "9.0"]
        known += ["10.0", "12.0"] if tuple(map(int, release.split("."))) >= (12, 8) else []
        home = fake_nvcc(tmp_path, release, *known)
        if asked is not None:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        given = dict(torch_cuda=torch_cuda, cuda_home=home, files=["csrc/cuda/dense.cu"]) | other
        return setup_script["cuda_plan"](choice, *given.values())

    return decide


@pytest.mark.parametrize(
    "release, asked, architectures, lacking",
    [
        ("12.8", None, "8.0;8.6;8.9;9.0;10.0;12.0+PTX", ""),
        ("12.4", None, "8.0;8.6;8.9;9.0+PTX", "10.0, 12.0+PTX"),
        ("12.4", "", "8.0;8.6;8.9;9.0+PTX", "10.0, 12.0+PTX"),
        ("12.8", "5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX", "5.2, 6.0, 6.1, 7.0, 7"),
        ("12.4", "7.5;9.0a;10.0+PTX", "9.0a+PTX", "7.5, 10.0+PTX"),
        ("12.8", "Volta;Turing;Ampere", "Ampere", "Volta, Turing"),
        ("12.8", "native", "native", ""),
    ],
)
def test_architectures_that_cannot_be_built_are_left_out(
    release, asked, architectures, lacking, plan
):
    for choice in ("auto", "1"):
        built, left_out = plan(choice, release, asked)
        assert built == architectures
        assert lacking in left_out and bool(left_out) == bool(lacking)


@pytest.mark.parametrize(
    "case, reason",
    [
        (dict(release="11.8"), r"nvcc is of CUDA 11\.8 and torch was built with CUDA 12\.6"),
        (dict(release="13.0"), r"nvcc is of CUDA 13\.0 and torch was built with CUDA 12\.6"),
        (dict(asked="7.0;7.5"), "TORCH_CUDA_ARCH_LIST=7.0;7.5: all below 8.0, or not in"),
        (dict(release="12.4", asked="12.0"), "TORCH_CUDA_ARCH_LIST=12.0: all below 8.0, or not"),
        (dict(torch_cuda=None), "this torch is no CUDA build"),
        (dict(cuda_home=None), "there is no nvcc"),
        (dict(cuda_home="/elsewhere"), "there is no nvcc"),
        (dict(files=[]), "there are no CUDA sources"),
    ],
)
def test_without_cuda_where_it_cannot_be_built(case, reason, plan):
    architectures, left_out = plan("auto", **case)
    assert architectures == "" and re.search(reason, left_out)
    assert plan("0", **case) == ("", "MARGINKERNELS_CUDA=0")
    with pytest.raises(SystemExit, match=f"MARGINKERNELS_CUDA=1: .*{reason}"):
        plan("1", **case)


def test_an_isolated_build_sees_the_users_torch(monkeypatch, tmp_path):
    pytest.importorskip("setuptools.build_meta")
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    for prefixes, seen in ([sys.base_prefix], True), (["/a/virtual/environment"], False):
        monkeypatch.setattr(site, "PREFIXES", prefixes)
        monkeypatch.setattr(sys, "path", ["first"])
        runpy.run_path(str(ROOT / "build_backend.py"))
        assert sys.path[0] == "first" and (sys.path[-1] == str(tmp_path)) is seen


def test_build_settings(setup_script, monkeypatch):
    extension = setup_script["extension"]
    monkeypatch.setenv("MARGINKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="MARGINKERNELS_CUDA: expected one of auto, 0, 1, got 'ye"):
        extension()
    monkeypatch.setenv("MARGINKERNELS_EXT", "0")
    assert extension() == {}
    monkeypatch.setenv("MARGINKERNELS_EXT", "2")
    with pytest.raises(SystemExit, match="MARGINKERNELS_EXT: expected one of 1, 0, got '2'"):
        extension()


def test_build_without_torch_says_what_to_do(setup_script, monkeypatch):
    from setuptools import Distribution

    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    options = setup_script["extension"]()
    assert "csrc/module.cpp" in options["ext_modules"][0].sources
    with pytest.raises(SystemExit, match="install torch first"):
        options["cmdclass"]["build_ext"](Distribution()).run()
