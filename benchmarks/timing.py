# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Times a step, forward and backward, of every contender; they take turns."""

import functools
import random
import resource
import time
from typing import NamedTuple

import torch

from . import peaks
from .contenders import Contender, Operands, Shape, contenders, problem
from .process import Memory

WARM_UP_STEPS = 2
# On a CPU without bf16 instructions autocast is so slow that a run would take hours.
TOO_SLOW_MS = 30_000
# OpenMP's threads spin for some milliseconds after their last task, on a core that others need.
SETTLE_SECONDS = 0.02


class Step(NamedTuple):
    """Holds what one step took."""

    ms: float  # forward and backward
    forward_ms: float
    page_faults: int
    loss: float
    roof: float | None  # GFLOP/s in registers, just before this step


class Config(NamedTuple):
    """Holds what is to be measured."""

    shape: Shape
    device: str
    backend: str
    only: list[str] | None
    repeats: int
    memory: Memory


class Measured(NamedTuple):
    """Holds the measurements of one process."""

    steps: dict[str, list[Step]]  # by contender, one per round
    skipped: dict[str, str]  # contender or peak -> reason
    peaks: dict[str, list[float]]


def measure(config: Config) -> Measured:
    """Measures every contender and every peak once in each round, in another order each time.

    So a clock that drifts, or a neighbour on the machine, meets all alike. No contender always
    inherits the caches and the heap of the same other.
    """
    operands = problem(config.shape, config.device)
    n, c, d = config.shape
    # twice what eager PyTorch holds at its peak, some 6 x (N, C) and 3 x (C, D) fp32 numbers
    if config.device == "cpu":
        config.memory.prepare(4 * (12 * n * c + 6 * c * d))
    runners, skipped = _warmed_up(config, operands)
    probes, missing = peaks.probes(config.device)
    steps: dict[str, list[Step]] = {runner.name: [] for runner in runners}
    rates: dict[str, list[float]] = {name: [] for name in probes}

    def take_turn(runner: Contender) -> None:
        roof = peaks.ROOFS[runner.compute]
        if roof in probes:
            take_rate(roof)
        _wake_threads(config.device)
        result = step(runner, operands)
        steps[runner.name].append(result._replace(roof=rates[roof][-1] if roof in probes else None))

    def take_rate(peak: str) -> None:
        if peak in peaks.ROOFS.values():
            time.sleep(SETTLE_SECONDS)
        else:
            _wake_threads(config.device)
        rates[peak].append(probes[peak]())

    turns = [functools.partial(take_turn, runner) for runner in runners]
    turns += [functools.partial(take_rate, peak) for peak in probes]
    for round_ in range(config.repeats):
        random.Random(round_).shuffle(turns)
        for turn in turns:
            turn()
    return Measured(steps, skipped | missing, rates)


def _warmed_up(config: Config, operands: Operands) -> tuple[list[Contender], dict[str, str]]:
    """Returns the contenders that run here, warmed up, and why the others do not."""
    runners, skipped = [], {}
    for contender in contenders(config.backend, config.only):
        try:
            milliseconds = [step(contender, operands).ms for _ in range(WARM_UP_STEPS)]
        except (RuntimeError, ValueError, NotImplementedError) as error:
            skipped[contender.name] = str(error).splitlines()[0]
            continue
        if milliseconds[-1] > TOO_SLOW_MS:
            skipped[contender.name] = f"a step takes {milliseconds[-1] / 1e3:.0f} s"
        else:
            runners.append(contender)
    return runners, skipped


def step(contender: Contender, operands: Operands) -> Step:
    """Takes a training step of the head: the loss, new dx and dw, and their release."""
    x, w, _ = operands
    device = x.device.type
    faults = _page_faults()
    start = _stamp(device)
    loss = contender.loss(*operands)
    middle = _stamp(device)
    gradients = torch.autograd.grad(loss, (x, w))
    # a trainer frees them each step, and a buffer that was mapped costs time to unmap
    del gradients
    end = _stamp(device)
    faults = _page_faults() - faults
    # not timed, because reading the loss synchronises a GPU
    value = float(loss.detach())
    return Step(_ms(start, end), _ms(start, middle), faults, value, None)


def _wake_threads(device: str) -> None:
    """Gives torch's threads some 30 ms of work, as the backbone does before the head.

    Threads that slept may wake on one core and share it for as long as that.
    """
    square = torch.ones(1024, 1024, device=device)
    for _ in range(3):
        square = square @ square / 1024


def _stamp(device: str) -> float | torch.cuda.Event:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)
        return 1e3 * (end - start)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
