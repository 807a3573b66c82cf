# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what all timings share: stamps, turns in another order each round, and who can run."""

import random
import resource
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

WARM_UP_STEPS = 2
# On a CPU without bf16 instructions autocast is so slow that a run would take hours.
TOO_SLOW_MS = 30_000
# a contender that raises one of these does not run here; the reason is printed
CANNOT_RUN = (RuntimeError, ValueError, NotImplementedError, ImportError)


def take_turns(turns: Sequence[Callable[[], object]], rounds: int) -> None:
    """Calls every turn once in each round, in another order each time.

    So a clock that drifts, or a neighbour on the machine, meets all alike. No contender always
    inherits the caches and the heap of the same other.
    """
    order = list(turns)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for turn in order:
            turn()


class Timed(Protocol):
    """Holds what a step took."""

    @property
    def ms(self) -> float:
        """Returns the time of the step."""

    @property
    def forward_ms(self) -> float:
        """Returns the time up to the loss."""

    @property
    def page_faults(self) -> int:
        """Returns how many there were."""

    @property
    def loss(self) -> float:
        """Returns the loss."""


def reason_not_to_run(step: Callable[[], Timed]) -> str | None:
    """Warms a contender up by some steps, or returns why it does not run."""
    try:
        last = [step().ms for _ in range(WARM_UP_STEPS)][-1]
    except CANNOT_RUN as error:
        return first_line(error)
    return f"a step takes {last / 1e3:.0f} s" if last > TOO_SLOW_MS else None


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def wake_threads(device: str) -> None:
    """Gives torch's threads some 30 ms of work, as the backbone does before the head.

    Threads that slept may wake on one core and share it for as long as that.
    """
    square = torch.ones(1024, 1024, device=device)
    for _ in range(3):
        square = square @ square / 1024


def stamp(device: str) -> float | torch.cuda.Event:
    """Returns the time, of which :func:`ms` takes the difference."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Returns the milliseconds between two stamps; on a GPU the device must be done with both."""
    if isinstance(start, float):
        assert isinstance(end, float)
        return 1e3 * (end - start)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)


def page_faults() -> int:
    """Returns how many page faults this process had without a read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
