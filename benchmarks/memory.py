# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures peak memory, each contender in its own process."""

from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from . import process
from .contenders import Contender, Shape, contenders, problem
from .sweeps import step
from .timing import CANNOT_RUN, first_line

# enough to load code and start threads before the count begins, too few to leave buffers behind
WARM_UP_CLASSES = 1024


def extra_peaks(
    names: Iterable[str], extra_peak: Callable[..., int], *arguments: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns MiB by contender, and the reason for those that do not run.

    Args:
        extra_peak: returns the bytes of the contender that its first argument names.
        arguments: the others.
    """
    found, skipped = {}, {}
    for name in names:
        try:
            extra = process.in_child(process.EXACT_COUNT, extra_peak, name, *arguments)
            found[name] = extra / 2**20
        except BrokenProcessPool:
            skipped[name] = "the process was killed: out of memory?"
        except CANNOT_RUN as error:
            skipped[name] = first_line(error)
    return found, skipped


def held(device: str) -> int:
    """Returns the bytes that this process holds now."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return process.resident_bytes("VmRSS")


def growth(device: str, run: Callable[[], object]) -> int:
    """Returns the bytes by which the peak during a call exceeds what was there before it."""
    before = held(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    process.reset_peak()
    run()
    return process.resident_bytes("VmHWM") - before


def warm_up_classes(kind: str, classes: int) -> int:
    """Returns with how many classes a contender is warmed up before the count.

    A compiled one needs its own shape now: compiling would count if it came later.
    """
    return classes if kind == "torch.compile" else min(classes, WARM_UP_CLASSES)


def beyond_gradients(name: str, shape: Shape, device: str, backend: str) -> int:
    """Returns the peak of forward and backward beyond x, w, dx and dw, in bytes."""
    contender = next(c for c in contenders(backend) if c.name == name)
    _warm_up(contender, shape, device)
    operands = problem(shape, device)
    gradients = sum(t.nbytes for t in operands[:2])
    return growth(device, lambda: step(contender, operands)) - gradients


def _warm_up(contender: Contender, shape: Shape, device: str) -> None:
    classes = warm_up_classes(contender.kind, shape.c)
    step(contender, problem(shape._replace(c=classes), device))
