# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the formulas behind docs/scaling.md with small runs, and runs the example of a million
identities, with fewer, alone and under torchrun.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from marginkernels import ArcFace, MarginSoftmaxHead, Sharding, device_checks, sweep
from marginkernels.distributed import collectives
from marginkernels.optim import SGD
from tests.support import simulation, workers
from tools.docs import scaling

ROOT = Path(__file__).parents[1]


# in fp32 w is read as it is, and in bf16 it is rounded into a buffer
SETUPS = [
    dict(classes=500, gpus=2, rows=32, features=64, itemsize=4),
    dict(classes=500, gpus=2, rows=32, features=64, itemsize=2, optimizer_numbers=2),
    dict(classes=500, gpus=2, rows=32, features=64, itemsize=2, weight_bytes=2, fused=True),
]


def test_the_page_is_up_to_date():
    assert scaling.PATH.read_text() == scaling.document(), "run python -m tools.docs.scaling"


def peak_bytes(function):
    """Returns the most bytes that torch's allocator had handed out at once during the function."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(torch.tensor(sizes).cumsum(0).max())


def multiply_outside_torch(patch):
    """Computes bf16 GEMMs by numpy, because on a GPU they take none of torch's memory."""
    from marginkernels.backends.triton import vendor_gemm

    def wide(t):
        if t.dtype == torch.float32:
            return t.numpy()
        return (t.view(torch.int16).numpy().astype("int32") << 16).view("float32")

    patch.setattr(
        vendor_gemm, "mm", lambda out, a, b: out.numpy().__setitem__(..., wide(a) @ wide(b))
    )
    patch.setattr(vendor_gemm, "add_mm", lambda out, a, b: out.numpy().__iadd__(wide(a) @ wide(b)))


def measure(setup):
    """Returns the bytes of a rank that last, that a step takes besides, and that it exchanges."""
    s = scaling.Setup(**setup)
    x_type = {4: torch.float32, 2: torch.bfloat16}[s.itemsize]
    with simulation.simulated("ttsem"), pytest.MonkeyPatch.context() as patch:
        multiply_outside_torch(patch)
        patch.setattr(device_checks, "checks_values", lambda _: False)  # as on a GPU
        head = MarginSoftmaxHead(
            s.features, s.classes, margin=ArcFace(0.3), scale=16.0, backend="triton",
            save_tiles=False, sharding=Sharding(dist.group.WORLD, even_batches=True),
            dtype={4: torch.float32, 2: torch.bfloat16}[s.weight_bytes],
        )  # fmt: skip
        if s.fused:
            optimizer = SGD(head, lr=0.1, momentum=0.9)
        elif s.optimizer_numbers == 1:
            optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(head.parameters())
        x = torch.randn(s.rows, s.features, dtype=x_type, requires_grad=True)
        y = torch.randint(s.classes, (s.rows,))
        volume = []

        def counted(collective):
            def call(to, given, **settings):
                volume.append(max(to.nbytes, given.nbytes))
                return collective(to, given, **settings)

            return call

        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(collectives, name, counted(getattr(collectives, name)))
        peak = peak_bytes(lambda: head(x, y).backward())
        optimizer.step()
    gradients = [] if s.fused else [head.weight.grad]
    state = [t for t in optimizer.state[head.weight].values() if t.ndim > 0]
    lasting = sum(t.to_local().nbytes for t in (head.weight, *gradients, *state))
    # the gradient lasts, and this rank's dx belongs to the backbone
    peak -= x.grad.nbytes + sum(t.to_local().nbytes for t in gradients)
    return lasting, peak, volume


@pytest.mark.parametrize("setup", SETUPS, ids=["fp32", "bf16", "fused"])
def test_small_runs_agree_with_the_formulas(setup):
    simulation.require("ttsem")
    s = scaling.Setup(**setup)
    lasting, working, volume = workers.run(2, measure, setup)[0]
    assert lasting == scaling.lasting(s)
    assert volume == list(scaling.volume(s).values())
    assert 0.9 * scaling.working(s) < working <= scaling.working(s)


def test_the_traffic_that_launchers_ask_for_agrees_with_the_formulas():
    pytest.importorskip("triton", reason="the package triton is not installed")
    traffic = importlib.import_module("tools.traffic")
    for setting, formula in zip(traffic.SETTINGS, scaling.TRAFFIC, strict=True):
        assert setting.name == formula.name
        weights = 100_003 * 128
        accesses = traffic.count(setting._replace(n=130, c=100_003, d=128))
        assert traffic.total(accesses, traffic.PASS) == formula.passes() * weights
        assert traffic.total(accesses, traffic.MATRIX) == formula.products() * weights


def test_the_formulas_know_the_launcher():
    operands = pytest.importorskip("marginkernels.backends.triton.operands")
    configs = importlib.import_module("marginkernels.backends.triton.configs")
    assert scaling.CHUNK_BYTES == operands.CHUNK_BYTES
    assert scaling.ROUNDED_BYTES == sweep._ROUNDED_BYTES
    assert scaling.ROW_PADDING == configs.ROW_PADDING


@pytest.fixture
def example(monkeypatch):
    """Returns the example of a million identities, with fewer on its command line."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    settings = ["--classes=3001", "--batch=31", "--steps=6", "--repeat=2", "--plain-steps=2"]
    script = str(ROOT / "examples" / "million_identities.py")
    monkeypatch.setattr(sys, "argv", [script, *settings])
    return importlib.import_module("million_identities")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rowwise_adagrad"])
def test_the_loss_of_the_example_falls_in_bfloat16(example, optimizer):
    args = example.arguments()
    args.optimizer, args.dtype = optimizer, "bfloat16"
    losses = example.train("fused", args, 6, print).losses
    assert losses[-1] < 0.5 * losses[0]


def test_the_example_alone_and_under_torchrun(example):
    """Expects the same losses of both heads, and of the fused one split over two processes."""
    args = example.arguments()
    alone, plain = (example.train(kind, args, 6, print).losses for kind in ("fused", "torch"))
    assert alone[-1] < 0.5 * alone[0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *sys.argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^step.*loss +([\d.]+)", done.stdout, re.M)
    for others in (plain, [float(loss) for loss in losses]):
        assert others == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert re.search(r"peak RSS of each rank: [\d.]+ GiB, [\d.]+ GiB", done.stdout)
    assert re.search(r"plain PyTorch  [\d.]+ s a step", done.stdout)
