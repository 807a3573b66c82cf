# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fixtures: every test that takes ``device`` or ``backend`` runs on each that this machine has; the
CUDA kernels too, on the CPU.
"""

import pytest
import torch

from marginkernels import backend_report
from marginkernels.backends import reasons
from tests.emulation import host
from tests.support import simulation

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = list(backend_report())
# what judges numbers; the rest is the same for every backend
ON_FIBERS = (
    "test_head",
    "test_hard_cases",
    "test_logits",
    "test_losses",
    "test_transforms",
    "test_unchecked",
)


def pytest_addoption(parser):
    parser.addoption(
        "--simulate",
        choices=simulation.SIMULATORS,
        help="also run the triton backend on the CPU, its launches executed by a simulator",
    )


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        fibers = [host.NAME] if metafunc.module.__name__ in ON_FIBERS else []
        metafunc.parametrize("backend", BACKENDS + fibers, indirect=True)


@pytest.fixture
def backend(request, device):
    """A backend that can run on ``device``; skipped with its own reasons where it cannot."""
    simulator = request.config.getoption("--simulate")
    if simulator and (request.param, device) == ("triton", "cpu"):
        with simulation.simulated(simulator):
            yield request.param
        return
    if request.param == host.NAME:
        if device != "cpu":
            pytest.skip("the CUDA kernels run as they are there")
        with host.executed():
            yield request.param
        return
    why_not = reasons(request.param, device)
    if why_not:
        pytest.skip(f"{request.param} on {device}: " + "; ".join(why_not))
    yield request.param


@pytest.fixture
def poisoned():
    """Fills fresh tensors with NaN: a kernel that reads or leaves what it did not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
