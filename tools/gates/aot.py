# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Ahead-of-time compilation of exactly what the launchers launch, for GPUs that are not here."""

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
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
    """The row of the table of configurations that a target uses."""
    return "sm_86" if target == "sm_89" else target


@dataclass(frozen=True)
class Launch:
    """A kernel as one call specialises it; equal ones are compiled once by Triton too."""

    kernel: str
    key: str
    source: ASTSource = field(compare=False)
    options: dict = field(compare=False)
    arguments: dict = field(compare=False)
    grid: tuple = field(compare=False)


@contextlib.contextmanager
def recorded_launches(target: str):
    """Launches are specialised as on ``target`` and recorded, not executed, inside this context.

    So a launcher may be called with CPU tensors; what it returns is not computed.
    """
    gpu = GPU_TARGETS[target]
    backend = make_backend(gpu)
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
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


def compile_launch(launch: Launch, target: str):
    """Triton's compiled kernel: ``asm`` by stage, and ``metadata``."""
    return triton.compile(launch.source, target=GPU_TARGETS[target], options=launch.options)


@contextlib.contextmanager
def quiet():
    """Without the output of this process and its children: ptxas prints a whole program when it
    fails. The output is part of the exception then.
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


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
