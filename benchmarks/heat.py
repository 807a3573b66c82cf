# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures this library's head over sizes: what share of what the machine can do it reaches.

    python -m benchmarks.heat                    # table, docs/heat.png and docs/heat.csv
    python -m benchmarks.heat --n 16 --d 64 512  # some sizes only, and no picture
    python -m benchmarks.heat --save-tiles       # with the exponentials kept for backward
    python -m benchmarks.heat --busy             # on a machine that others use

No exact head is faster than the larger of two times: 6NCD operations at the rate of multiply-adds
between registers, and reading w twice and writing dw once at the rate of memory. The share is this
time over that of forward and backward, on warm buffers. Rates and steps take turns. The best step
of each size counts, and the best rates of the whole run: a neighbour only ever makes them worse.
With --busy time is that of all threads on processors, divided by their number, and rates are
medians. That leaves out what a neighbour takes, and what threads wait for each other.
Without kept exponentials backward computes the logits again, so that 75 % is the most where the
operations bind.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from . import peaks, process, table
from .contenders import Contender, Operands, Shape, contenders, problem, work
from .machine import header, provenance
from .process import Memory
from .sweeps import SETTLE_SECONDS, step
from .timing import take_turns, wake_threads

T = TypeVar("T")
FOLDER = Path(__file__).parents[1] / "docs"
ROWS, CLASSES, FEATURES = [16, 64, 256, 1024], [1_000, 10_000, 100_000, 2_000_000], [64, 512, 1024]
# cells with more operations, or larger weights, are left out: a second, and 2 GiB
MOST_FLOPS, MOST_BYTES = 1e11, 2 << 30
STEPS = 2  # of a head in its turn
COLUMNS: table.Columns = {
    "N": (6, "d"),
    "C": (9, "d"),
    "D": (6, "d"),
    "ms": (9, ".2f"),
    "floor ms": (10, ".2f"),
    "bound by": (12, "s"),
    "% of floor": (12, ".1f"),
}


def main() -> None:
    """Prints the table, and draws it where no size was chosen."""
    options = parse_options()
    print(header("cpu"))
    whole = options.n == ROWS and options.c == CLASSES and options.d == FEATURES
    shapes = [Shape(n, c, d) for d in options.d for n in options.n for c in options.c]
    kept = [s for s in shapes if 6 * s.n * s.c * s.d <= MOST_FLOPS and 4 * s.c * s.d <= MOST_BYTES]
    name = "tiles saved" if options.save_tiles else "recompute"
    warm = Memory(warm=True, huge_pages=options.huge_pages)
    # threads that spin while they wait would count as busy
    environment = warm.environment() | {"OMP_WAIT_POLICY": "passive"}
    asked = (kept, name, options.repeats, options.busy, warm)
    rows = process.in_child(environment, measured_rows, *asked)
    clock = "time on processors" if options.busy else "time"
    print(f"{name}, {clock}, {warm}, best of {STEPS * options.repeats}")
    print(table.text(rows, COLUMNS))
    if whole:
        from .heat_plot import draw

        table.write_csv(FOLDER / "heat.csv", [provenance("cpu") | row for row in rows])
        print("wrote", draw(rows, FOLDER / "heat.png", f"{name}, {clock}"), FOLDER / "heat.csv")


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.heat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, nargs="+", default=ROWS, help="batches")
    parser.add_argument("--c", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    parser.add_argument("--d", type=int, nargs="+", default=FEATURES, help="numbers of features")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--save-tiles", action="store_true", help="keep the exponentials")
    parser.add_argument("--busy", action="store_true", help="count the time on processors")
    parser.add_argument("--huge-pages", action="store_true", help="w lies in huge pages")
    return parser.parse_args()


def measured_rows(
    shapes: list[Shape], name: str, repeats: int, busy: bool, memory: Memory
) -> list[table.Row]:
    """Measures every shape in this process, by the head in fp32 and in bf16."""
    probes, missing = peaks.probes("cpu")
    if missing:
        print("left out:", missing)
    memory.prepare(16 * max(shape.c * shape.d for shape in shapes))  # w, dw and as much again
    heads = [c for c in contenders("native", [name]) if peaks.ROOFS[c.compute] in probes]
    names = [name for name in (*peaks.ROOFS.values(), *peaks.MEMORY) if name in probes]
    rates: dict[str, list[float]] = {name: [] for name in names}
    best_ms: dict[tuple[Shape, str], float] = {}
    for shape in shapes:
        operands = problem(shape, "cpu")
        turns = [functools.partial(take_rate, probes[name], busy, rates[name]) for name in rates]
        steps: dict[str, list[float]] = {head.compute: [] for head in heads}
        turns += [
            functools.partial(take_steps, head, operands, busy, steps[head.compute])
            for head in heads
        ]
        take_turns(turns, repeats)
        best_ms |= {(shape, head.compute): min(steps[head.compute]) for head in heads}
    peak = statistics.median if busy else max
    best = {name: peak(values) for name, values in rates.items()}
    return [cell(s, head, best, best_ms[s, head.compute]) for s in shapes for head in heads]


def take_rate(probe: peaks.Probe, busy: bool, rates: list[float]) -> None:
    """Measures a peak once."""
    time.sleep(SETTLE_SECONDS)
    share, rate = timed(probe, busy)
    rates.append(rate / share)


def take_steps(head: Contender, operands: Operands, busy: bool, milliseconds: list[float]) -> None:
    """Measures some steps of a head."""
    wake_threads("cpu")
    for _ in range(STEPS):
        share, taken = timed(functools.partial(step, head, operands), busy)
        milliseconds.append(taken.ms * share)


def timed(function: Callable[[], T], busy: bool) -> tuple[float, T]:
    """Calls a function; returns what share of its time threads were on processors, and its result.

    The share is 1 where busy is not asked for.
    """
    start, start_busy = time.perf_counter(), time.process_time()
    result = function()
    if not busy:
        return 1.0, result
    used = (time.process_time() - start_busy) / torch.get_num_threads()
    return min(1.0, used / (time.perf_counter() - start)), result


def cell(shape: Shape, head: Contender, best: dict[str, float], own: float) -> table.Row:
    """Returns one row of the table: a step's milliseconds, and the floor that binds."""
    counted = work(head, shape)
    floors = {
        "operations": counted.flops / best[peaks.ROOFS[head.compute]] * 1e-6,
        "memory": counted.bytes / max(best[name] for name in peaks.MEMORY) * 1e-6,
    }
    bound = max(floors, key=lambda name: floors[name])
    return {
        "contender": head.compute,
        "N": shape.n,
        "C": shape.c,
        "D": shape.d,
        "ms": own,
        "floor ms": floors[bound],
        "bound by": bound,
        "% of floor": 100 * floors[bound] / own,
    }


if __name__ == "__main__":
    main()
