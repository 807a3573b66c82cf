# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the Triton backend on CPU tensors: its own launchers, each launch executed by a simulator.

ttsem        Triton's IR in numpy: finds accesses out of bounds and races between programs
ptxsim       the PTX for sm_80 or sm_90 (tools/ptxsim): also finds races within a program,
             unfinished copies and missing fences
interpreter  Triton's own, which needs TRITON_INTERPRET=1 from the start of the process; fp32, fp16
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from marginkernels import backends
from marginkernels.backends import triton
from marginkernels.backends.triton import configs
from tools.ptxsim import Checks, triton_adapter

NAME = triton.TritonBackend.name
SIMULATORS = ("ttsem", "ptxsim", "interpreter")
TARGETS = ("sm_80", "sm_90")  # of ptxsim

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def require(simulator: str) -> None:
    """Skips the test, with the reason, where the simulator cannot run."""
    version = _version("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if simulator == "interpreter":
        require_interpreter()
        if not interpreted:
            pytest.skip("the process was not started with TRITON_INTERPRET=1")
    elif interpreted:
        pytest.skip("TRITON_INTERPRET=1 replaces Triton's compiler")
    elif simulator == "ttsem":
        pytest.importorskip("ttsem", reason="the package ttsem is not installed")
        if _release(version) < (3, 8):
            pytest.skip(f"ttsem does not read what Triton {version} prints")


def require_interpreter() -> None:
    """Skips the test where Triton's interpreter cannot run.

    Before 3.8 it makes a scalar of an array of one number, which numpy 2.4 refuses.
    """
    version, numpy = _version("triton"), _version("numpy")
    if _release(version) < (3, 8) and _release(numpy) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {version} fails beside numpy {numpy}")


def _version(name: str) -> str:
    return pytest.importorskip(name, reason=f"the package {name} is not installed").__version__


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


class SimulatedTriton(triton.TritonBackend):
    """Accepts CPU tensors, whose launches :func:`simulated` has executed by a simulator."""

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        return ["no fp64 kernels"] if compute_dtype == torch.float64 else []


@contextlib.contextmanager
def simulated(simulator: str, target: str | None = None, **settings: Any) -> Iterator[None]:
    """Makes ``backend="triton"`` accept CPU tensors inside this context.

    ``target`` is the GPU whose tiles are taken, and whose instructions ptxsim executes: one of
    :data:`TARGETS`, or None, the row of the table that a CPU has.
    """
    require(simulator)
    from marginkernels.backends.triton.backward import head_bwd
    from marginkernels.backends.triton.forward import head_fwd
    from marginkernels.backends.triton.loss import head_held, head_loss
    from marginkernels.backends.triton.step import head_step

    library = torch.library.Library("marginkernels", "IMPL")
    for op in (head_fwd, head_bwd, head_step, head_held, head_loss):
        library.impl(f"{op.__name__}_{NAME}", _without_autocast(op), "CPU")
    with contextlib.ExitStack() as stack:
        stack.callback(library._destroy)
        stack.enter_context(backends.registered(SimulatedTriton()))
        if target is not None:
            row = configs.Target(target, multiprocessors=2)
            stack.enter_context(mock.patch.object(configs, "target", lambda _: row))
        stack.enter_context(_session(simulator, target or "sm_80", **settings))
        if simulator == "ttsem":
            # torch.compile must not take the stand-in for a driver for one
            importlib.import_module("ttsem._fakedriver").unstub_torch_cuda()
        yield


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """Returns a module of kernels with one piece of its text replaced."""
    text = Path(str(module.__file__)).read_text()
    assert text.count(old) == 1
    path = folder / "mutated_kernels.py"
    path.write_text(text.replace(old, new))
    name = f"{module.__package__}.mutated_kernels"  # imports go out from there
    spec = importlib.util.spec_from_file_location(name, path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def _session(simulator: str, target: str, **settings: Any) -> contextlib.AbstractContextManager:
    if simulator == "ttsem":
        sanitize = importlib.import_module("ttsem.sanitize")
        return sanitize.session(cc=80, cuda_is_cpu=False, **settings)
    if simulator == "ptxsim":
        checks = Checks.strict()
        # a known fault, see FENCED_TRITON: everything else is still checked
        checks.copy_fence = triton.installed_version() >= triton.FENCED_TRITON
        number = int(target.removeprefix("sm_"))
        return triton_adapter.simulated_launches(number, checks=checks, **settings)
    return contextlib.nullcontext()


def _without_autocast(op: Callable) -> Callable:
    def call(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", enabled=False):
            return op(x, *args, **settings)

    return call
