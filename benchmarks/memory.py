# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures the peak memory of a step beyond x, w, dx and dw, each head in its own process."""

from concurrent.futures.process import BrokenProcessPool

import torch

from . import process
from .contenders import Contender, Shape, contenders, problem
from .timing import step

# enough to load code and start threads before the count begins, too few to leave buffers behind
WARM_UP_CLASSES = 1024


def extra_peaks(
    shape: Shape, device: str, backend: str, only: list[str] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns MiB by contender, and the reason for those that do not run."""
    found, skipped = {}, {}
    for contender in contenders(backend, only):
        arguments = (contender.name, shape, device, backend)
        try:
            extra = process.in_child(process.EXACT_COUNT, _extra_peak, *arguments)
            found[contender.name] = extra / 2**20
        except BrokenProcessPool:
            skipped[contender.name] = "the process was killed: out of memory?"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            skipped[contender.name] = str(error).splitlines()[0]
    return found, skipped


def _extra_peak(name: str, shape: Shape, device: str, backend: str) -> int:
    contender = next(c for c in contenders(backend) if c.name == name)
    _warm_up(contender, shape, device)
    operands = problem(shape, device)
    gradients = sum(t.nbytes for t in operands[:2])
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(contender, operands)
        return torch.cuda.max_memory_allocated() - before - gradients
    before = process.resident_bytes("VmRSS")
    process.reset_peak()
    step(contender, operands)
    return process.resident_bytes("VmHWM") - before - gradients


def _warm_up(contender: Contender, shape: Shape, device: str) -> None:
    # a compiled contender needs its own shape now: compiling would count if it came later
    compiled = contender.kind == "torch.compile"
    classes = shape.c if compiled else min(shape.c, WARM_UP_CLASSES)
    step(contender, problem(shape._replace(c=classes), device))
