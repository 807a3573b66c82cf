# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles exactly what the Triton launchers launch, for GPUs that are not here."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from marginkernels.backends.triton import configs

GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132


def table_name(target: str) -> str:
    """Returns the row of the table of configurations that a target uses."""
    return "sm_86" if target == "sm_89" else target


@dataclass(frozen=True)
class Launch:
    """Holds a kernel as one call specialises it; Triton compiles equal ones once."""

    kernel: str
    key: str
    source: ASTSource = field(compare=False)
    options: dict = field(compare=False)
    arguments: dict = field(compare=False)
    grid: tuple = field(compare=False)


@contextlib.contextmanager
def recorded_launches(target: str) -> Iterator[list[Launch]]:
    """Yields a list of the launches inside this context, specialised as on ``target``.

    No launch is executed: a launcher may be called with CPU tensors, and returns undefined numbers.
    """
    gpu = GPU_TARGETS[target]
    backend = make_backend(gpu)
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(self.signature, self.params, backend)
        kwargs["debug"] = False
        bound, specialization, options = binder(*args, **kwargs)
        key = f"{specialization}{sorted(options.items())}"
        parsed, signature, constexprs, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(self, signature, constexprs, attributes)
        launches.append(Launch(self.__name__, key, source, parsed.__dict__, dict(bound), grid))

    device = configs.Target(table_name(target), MULTIPROCESSORS)
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(configs, "target", lambda _: device),
    ):
        yield launches


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """Returns Triton's compiled kernel: ``asm`` by stage, and ``metadata``."""
    return triton.compile(launch.source, target=GPU_TARGETS[target], options=launch.options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the output of this process and its children inside this context.

    ptxas prints a whole program when it fails; the exception has its output too.
    """
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)
