# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Times forward and backward, without an optimizer, of every contender; they take turns."""

import functools
import time
from typing import NamedTuple

import torch

from . import peaks
from .contenders import Contender, Operands, Shape, contenders, problem
from .process import Memory
from .timing import ms, page_faults, reason_not_to_run, stamp, take_turns, wake_threads

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
    """Measures every contender and every peak once in each round."""
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
        wake_threads(config.device)
        result = step(runner, operands)
        steps[runner.name].append(result._replace(roof=rates[roof][-1] if roof in probes else None))

    def take_rate(peak: str) -> None:
        if peak in peaks.ROOFS.values():
            time.sleep(SETTLE_SECONDS)
        else:
            wake_threads(config.device)
        rates[peak].append(probes[peak]())

    turns = [functools.partial(take_turn, runner) for runner in runners]
    turns += [functools.partial(take_rate, peak) for peak in probes]
    take_turns(turns, config.repeats)
    return Measured(steps, skipped | missing, rates)


def _warmed_up(config: Config, operands: Operands) -> tuple[list[Contender], dict[str, str]]:
    """Returns the contenders that run here, warmed up, and why the others do not."""
    runners, skipped = [], {}
    for contender in contenders(config.backend, config.only):
        reason = reason_not_to_run(functools.partial(step, contender, operands))
        if reason is None:
            runners.append(contender)
        else:
            skipped[contender.name] = reason
    return runners, skipped


def step(contender: Contender, operands: Operands) -> Step:
    """Takes a training step of the head: the loss, new dx and dw, and their release."""
    x, w, _ = operands
    device = x.device.type
    faults = page_faults()
    start = stamp(device)
    loss = contender.loss(*operands)
    middle = stamp(device)
    gradients = torch.autograd.grad(loss, (x, w))
    # a trainer frees them each step, and a buffer that was mapped costs time to unmap
    del gradients
    end = stamp(device)
    faults = page_faults() - faults
    # not timed, because reading the loss synchronises a GPU
    value = float(loss.detach())
    return Step(ms(start, end), ms(start, middle), faults, value, None)
