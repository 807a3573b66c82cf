# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs every test that takes ``device`` or ``backend`` on each that this machine has.

The CUDA kernels run on the CPU too, as the backend of tests/emulation/host.py.
"""

import contextlib
from collections.abc import Iterator

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
    "test_class_sums",
    "test_hard_cases",
    "test_logits",
    "test_losses",
    "test_transforms",
    "test_unchecked",
    "test_update",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulate",
        choices=simulation.SIMULATORS,
        help="also run the triton backend on the CPU, its launches executed by a simulator",
    )
    parser.addoption(
        "--target",
        choices=simulation.TARGETS,
        help="with --simulate: take the tiles of this GPU; ptxsim executes its instructions",
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="only run what runs on this device: with cuda, tests of numbers and of GPUs",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a GPU only")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: cuda needs a GPU, and torch finds none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--device")
    if wanted is not None:
        config.hook.pytest_deselected(items=[i for i in items if device_of(i) != wanted])
        items[:] = [item for item in items if device_of(item) == wanted]


def device_of(item: pytest.Item) -> str:
    """Returns the device that a test computes on; the emulation computes on the CPU."""
    if item.get_closest_marker("gpu"):
        return "cuda"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "cpu" if parameters.get("backend") == host.NAME else parameters.get("device", "cpu")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        fibers = [host.NAME] if metafunc.module.__name__ in ON_FIBERS else []
        metafunc.parametrize("backend", BACKENDS + fibers, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Returns a backend that can run on ``device``, or skips the test with its reasons."""
    name, simulator = request.param, request.config.getoption("--simulate")
    with contextlib.ExitStack() as stack:
        if name == simulation.NAME and simulator and device == "cpu":
            target = request.config.getoption("--target")
            stack.enter_context(simulation.simulated(simulator, target))
        if name == host.NAME:
            if device != "cpu":
                pytest.skip("the CUDA kernels run as they are there")
            stack.enter_context(host.executed())
        if why_not := reasons(name, device):
            pytest.skip(f"{name} on {device}: " + "; ".join(why_not))
        yield name


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills fresh tensors with NaN, which shows a kernel that reads or leaves unwritten numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
