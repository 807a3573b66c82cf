# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the checks of the Triton kernels: simulators find planted faults, and the gate bad code."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from marginkernels import ArcFace
from marginkernels.backends import triton
from marginkernels.backends.triton import configs
from marginkernels.backends.triton.configs import Config
from tests.support.problems import random_problem
from tests.support.simulation import mutated, needs_triton, require, simulated
from tools.ptxsim import Module, SimError, triton_adapter
from tools.ptxsim.errors import AsyncCopyError, AsyncMmaError, MissingFenceError

BF16, F32 = torch.bfloat16, torch.float32


# all programs of a row tile write the same partials
RACE = "slot = partials + column.to(tl.int64) * N + row", "slot = partials + row"


@pytest.mark.parametrize(
    "kernel, old, new, complaint",
    [
        ("finish_rows", "cosine, mask=row < N)", "cosine)", "past the end"),
        ("statistics", RACE[0], RACE[1], "both touch element"),
        ("statistics", "k = tl.arange(0, BLOCK_D)", "k = 16 + tl.arange(0, BLOCK_D)", "the end"),
    ],
    ids=["missing mask", "race", "overrun"],
)
@needs_triton
def test_ttsem_finds_planted_faults(kernel, old, new, complaint, tmp_path, monkeypatch):
    require("ttsem")
    sanitize = importlib.import_module("ttsem.sanitize")
    from marginkernels.backends.triton import forward, row_kernels, tile_kernels

    module = tile_kernels if kernel == "statistics" else row_kernels
    mutant = getattr(mutated(module, old, new, tmp_path), f"{kernel}_kernel")
    monkeypatch.setattr(forward, f"{kernel}_kernel", mutant)
    # one row tile, so that two programs share its classes
    problem = random_problem(58, 300, 64, margin=ArcFace(0.3), scale=32.0)
    with simulated("ttsem"), pytest.raises(sanitize.KernelFault, match=complaint):
        problem.solve_fused("triton")


@needs_triton
def test_ptxsim_finds_a_planted_race(tmp_path, monkeypatch):
    from marginkernels.backends.triton import forward, tile_kernels

    mutant = mutated(tile_kernels, *RACE, tmp_path)
    monkeypatch.setattr(forward, "statistics_kernel", mutant.statistics_kernel)
    problem = random_problem(20, 150, 64, margin=ArcFace(0.3), scale=32.0)
    with simulated("ptxsim"), pytest.raises(SimError, match="different value"):
        problem.solve_fused("triton")


@pytest.mark.parametrize(
    "descriptors, instruction, error",
    [
        (False, r"wgmma\.wait_group\.sync\.aligned \d+;", AsyncMmaError),
        (False, r"fence\.proxy\.async\S*;", MissingFenceError),
        (True, r"mbarrier\.try_wait.*\n.*bra\.uni waitLoop;", AsyncCopyError),
    ],
    ids=["wait of wgmma", "fence", "wait of a bulk copy"],
)
@needs_triton
def test_ptxsim_finds_what_is_missing(descriptors, instruction, error, monkeypatch):
    """Takes instructions out of the PTX of the gradient for sm_90."""
    if error is MissingFenceError and triton.installed_version() < triton.FENCED_TRITON:
        pytest.skip("this Triton leaves the fence out")
    config = Config(64, 64, 64, 4, 3, 1, descriptors=descriptors, flatten=descriptors)
    from_ptx = Module.from_ptx

    def mutant(ptx: str, *device: object) -> Module:
        if ".entry gradient_kernel" in ptx:
            ptx, count = re.subn(instruction, "", ptx)
            assert count
        return from_ptx(ptx, *device)

    monkeypatch.setattr(triton_adapter, "_modules", {})
    monkeypatch.setattr(Module, "from_ptx", mutant)
    monkeypatch.setattr(configs, "choose", lambda *_: config)
    problem = random_problem(20, 100, 64, dtypes=(BF16, BF16, None), margin=ArcFace(0.3), scale=9.0)
    with simulated("ptxsim", "sm_90"), pytest.raises(error):
        problem.solve_fused("triton", save_tiles=False)


@needs_triton
def test_compile_gate_passes_one_configuration_per_target():
    result = subprocess.run(
        [sys.executable, "-m", "tools.gates.triton"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and " 0 failures" in result.stdout, result.stdout + result.stderr


@needs_triton
def test_compile_gate_fires(monkeypatch):
    gate = pytest.importorskip("tools.gates.triton")
    monkeypatch.setitem(gate.UPDATE_VARIANTS, "odd D", dict(rule="sgd", d=31))
    case = gate.Case("sm_80", "half", Config(64, 64, 64, 4, 3, 3), "odd D", ("update_kernel",))
    assert "stores of fewer than 16 bytes" in gate.describe(gate.check(case)[0])
    kernels = ("statistics_kernel",)
    for kind, config, complaint in (
        ("half", Config(128, 256, 64, 4, 3, 1), "spills"),
        ("half", Config(64, 64, 64, 4, 3, 9), "9 planned"),
        ("half", Config(64, 64, 64, 4, 1, 1), "no asynchronous copy"),
        ("half", Config(64, 64, 8, 4, 3, 1), "does not compile"),
        ("fp32", Config(64, 64, 16, 4, 3, 1), None),
    ):
        case = gate.Case("sm_80", kind, config, "plain", kernels)
        (row,) = gate.check(case)
        if complaint is None:
            assert not row.problems
            # code without matrix instructions, where they are expected
            row = row._replace(
                problems=gate.problems_of(case._replace(kind="tf32"), row.kernel, row.facts)
            )
            complaint = "no matrix instruction"
        assert any(complaint in problem for problem in row.problems), gate.describe(row)


# rows, classes, and targets of a row where it has several
SIZES = ((300, 1000, 2), (1, 1, 100), (16, 16, 16), (257, 4096, 17), (4097, 1, 3))


@needs_triton
def test_new_sizes_and_margins_compile_nothing():
    from marginkernels.backends.triton.configs import TABLE

    gate = pytest.importorskip("tools.gates.triton")
    config = TABLE["sm_90"]["half"][0]
    for settings in (
        {}, dict(w_dtype=F32, d=500), dict(bias=True, want_sum=True, extras=True), dict(labels=2)
    ):  # fmt: skip
        kernels = set()
        for n, c, labels in SIZES:
            own = dict(dtype=BF16) | settings
            if "labels" in own:
                own["labels"] = labels
            with gate.aot.recorded_launches("sm_90") as launches:
                gate.run_launchers(**own, n=n, c=c, config=config)
                gate.run_step(BF16, rule="adamw", n=n, c=c, config=config)
            kernels.add(frozenset((launch.kernel, launch.key) for launch in launches))
        assert len(kernels) == 1


@needs_triton
def test_launches_are_few():
    gate = pytest.importorskip("tools.gates.triton")
    with gate.aot.recorded_launches("sm_90") as launches:
        gate.run_launchers(dtype=BF16, n=300, c=1000)
    counts = Counter(launch.kernel for launch in launches)
    assert counts == dict(
        prepare_rows_kernel=2, flag_kernel=2, statistics_kernel=1, finish_rows_kernel=1,
        target_kernel=1, gradient_kernel=1, project_kernel=2, held_kernel=1, loss_kernel=1,
    )  # fmt: skip
