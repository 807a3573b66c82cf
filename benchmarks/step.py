# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures the whole step: forward, backward, optimizer, and the release of the gradients.

    python -m benchmarks.step                         # time and memory, one table
    python -m benchmarks.step --quick                 # without the memory
    python -m benchmarks.step --warm                  # as if every buffer were reused
    python -m benchmarks.step --plot                  # docs/step_time.png and docs/step_memory.png
    python -m benchmarks.step --busy                  # on a machine that others use

The head is ArcFace (m = 0.5, s = 64), and SGD has momentum 0.9 and weight decay 5e-4. "fused" is
this library's optimizer, which updates weights and momentum inside the backward sweep. "SGD", and
all peers, are with torch.optim.SGD(fused=True). Weights and momentum are fp32 unless the name says
more, and "fused, bf16 weights" has both in bf16. Peers compute in bf16 under "autocast".

The trainers of a table take turns in one process. In its turn a trainer starts from the same
weights, takes a step that is not counted, and one that is. Buffers are fresh, as in a trainer. With
--busy ratios and the picture compare the time of all threads on processors, divided by their
number, in the place of the time that passes.
"""

import argparse
import functools
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from . import command_line, process, table
from .contenders import Shape, problem
from .machine import header, provenance
from .memory import extra_peaks, growth, held, warm_up_classes
from .process import Memory
from .sweeps import Config
from .timing import ms, page_faults, reason_not_to_run, stamp, take_turns, wake_threads
from .trainers import Trainer, Training, trainers

PLOT_CLASSES = [10_000, 30_000, 100_000]
COLUMNS: table.Columns = {
    "ms": (8, ".1f"),
    "p20": (8, ".1f"),
    "p80": (8, ".1f"),
    "forward": (8, ".1f"),
    "backward": (9, ".1f"),
    "optimizer": (10, ".1f"),
    "busy": (8, ".1f"),
    "+MiB": (8, ".1f"),
    "x eager": (8, ".2f"),
    "x compiled": (11, ".2f"),
    "x sample": (9, ".2f"),
    "faults": (8, "d"),
    "loss": (9, ".4f"),
}
# column -> kind of trainer that it is a multiple of
BASELINES = {"x eager": "eager", "x compiled": "torch.compile", "x sample": "sampled"}
LEGEND = """\
ms           the whole step, median over the rounds; p20, p80: its percentiles
forward, backward, optimizer   its parts, medians; the last one frees the gradients as well
busy         time of all threads on processors / number of threads: what a neighbour does not take
+MiB         peak memory of a step beyond x and the weights: momentum, gradients, buffers
x eager, x compiled, x sample   how many times faster than eager, torch.compile and eager on 10 % in
             the same type and round
faults       page faults per step, median
no update    forward and backward alone; the gradient is freed
PartialFC    copies the rows and the momentum of a sample out, and back after the update"""


class Whole(NamedTuple):
    """Holds what one whole step took."""

    ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    busy_ms: float  # of processors, divided by the number of threads
    page_faults: int
    loss: float


def main() -> None:
    """Prints a table for each number of classes, and draws them."""
    options = parse_options()
    if not trainers(options.backend, options.only):
        raise SystemExit(f"no trainer's name contains one of {options.only}")
    print(header(options.device))
    facts = provenance(options.device)
    n, c, d = options.shape
    exported = []
    for classes in PLOT_CLASSES if options.plot else [c]:
        shape = Shape(n, classes, d)
        asked = (shape, options.device, options.backend, options.only, options.repeats)
        config = Config(*asked, Memory(options.warm, False))
        rows = measured_rows(config, options.quick, options.busy)
        setting = {"N": n, "C": classes, "D": d}
        exported += [facts | setting | row for row in rows]
    print("\n" + LEGEND)
    if options.csv and exported:
        table.write_csv(options.csv, exported)
    if options.plot:
        from . import step_plots

        print("wrote", *step_plots.draw(exported, options.busy))


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line.parser("step", __doc__, "trainers")
    parser.add_argument("--quick", action="store_true", help="without the memory column")
    parser.add_argument("--warm", action="store_true", help="buffers that are reused")
    parser.add_argument("--busy", action="store_true", help="compare the time on processors")
    parser.add_argument("--plot", action="store_true",
                        help=f"tables at C = {PLOT_CLASSES}, and two pictures in docs")  # fmt: skip
    return parser.parse_args()


def measured_rows(config: Config, quick: bool, busy: bool) -> list[table.Row]:
    """Measures one shape, and prints its table."""
    peaks: dict[str, float] = {}
    if not quick:
        names = [trainer.name for trainer in trainers(config.backend, config.only)]
        where = (config.shape, config.device, config.backend)
        peaks, _ = extra_peaks(names, beyond_weights, *where)
    steps, skipped = process.in_child(config.memory.environment(), measure, config)
    found = rows(config, steps, peaks, busy)
    print(f"\n(N, C, D) = {tuple(config.shape)}, {config.memory}, {config.repeats} rounds")
    if found:
        print(table.text(found, COLUMNS), flush=True)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")
    return found


def measure(config: Config) -> tuple[dict[str, list[Whole]], dict[str, str]]:
    """Measures every trainer once in each round.

    Returns the steps by trainer, and the reason for those that do not run.
    """
    x, w, y = problem(config.shape, config.device)
    n, c, d = config.shape
    if config.device == "cpu":
        config.memory.prepare(4 * (12 * n * c + 8 * c * d))
    steps: dict[str, list[Whole]] = {}
    skipped: dict[str, str] = {}

    def take_turn(trainer: Trainer) -> Whole:
        training = trainer.start(w.detach().clone())
        step(training, x, y)  # makes the momentum
        wake_threads(config.device)
        return step(training, x, y)

    def record(trainer: Trainer) -> None:
        steps[trainer.name].append(take_turn(trainer))

    turns = []
    for trainer in trainers(config.backend, config.only):
        reason = reason_not_to_run(functools.partial(take_turn, trainer))
        if reason is not None:
            skipped[trainer.name] = reason
            continue
        steps[trainer.name] = []
        turns.append(functools.partial(record, trainer))
    take_turns(turns, config.repeats)
    return steps, skipped


def step(training: Training, x: Tensor, y: Tensor) -> Whole:
    """Takes a whole step of the head, as a trainer takes it."""
    device = x.device.type
    faults, busy = page_faults(), time.process_time()
    start = stamp(device)
    loss = training.loss(x, y)
    forward = stamp(device)
    loss.backward()
    backward = stamp(device)
    training.optimizer.step()
    training.optimizer.zero_grad()
    x.grad = None
    end = stamp(device)
    busy, faults = time.process_time() - busy, page_faults() - faults
    # not timed, because reading the loss synchronises a GPU
    value = float(loss.detach())
    return Whole(
        ms(start, end), ms(start, forward), ms(forward, backward), ms(backward, end),
        1e3 * busy / torch.get_num_threads(), faults, value,
    )  # fmt: skip


def beyond_weights(name: str, shape: Shape, device: str, backend: str) -> int:
    """Returns the peak of two steps beyond x and the weights, in bytes.

    The first step makes the momentum of torch.optim, and only the second has all at once.
    """
    trainer = next(t for t in trainers(backend) if t.name == name)

    def started(classes: int) -> tuple[Training, Tensor, Tensor]:
        x, w, y = problem(shape._replace(c=classes), device)
        return trainer.start(w.detach()), x, y

    def run(training: Training, x: Tensor, y: Tensor) -> None:
        for _ in range(2):
            step(training, x, y)

    run(*started(warm_up_classes(trainer.kind, shape.c)))
    before = held(device)
    training, x, y = started(shape.c)
    state = held(device) - before - x.nbytes - training.weight.nbytes
    return state + growth(device, lambda: run(training, x, y))


def rows(
    config: Config, steps: dict[str, list[Whole]], peaks: dict[str, float], busy: bool
) -> list[table.Row]:
    """Returns one row for each trainer that ran."""
    ran = [t for t in trainers(config.backend, config.only) if t.name in steps]
    compared = {
        name: [whole._replace(ms=whole.busy_ms) if busy else whole for whole in own]
        for name, own in steps.items()
    }
    by_kind = {(t.kind, t.compute): compared[t.name] for t in ran}
    found = []
    for trainer in ran:
        own = steps[trainer.name]
        row: table.Row = {"contender": trainer.name, "compute": trainer.compute}
        row |= table.times(own)
        row["backward"] = statistics.median(whole.backward_ms for whole in own)
        row["optimizer"] = statistics.median(whole.optimizer_ms for whole in own)
        row["busy"] = statistics.median(whole.busy_ms for whole in own)
        row["+MiB"] = peaks.get(trainer.name)
        for column, kind in BASELINES.items():
            row[column] = table.speedup(
                by_kind.get((kind, trainer.compute)), compared[trainer.name]
            )
        found.append(row)
    return found


if __name__ == "__main__":
    main()
