# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes rows of measurements, and text and CSV of rows."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import contenders, work
from .peaks import MEMORY, ROOFS
from .sweeps import Config, Measured, Step
from .timing import Timed

Row = dict[str, Any]
Columns = dict[str, tuple[int, str]]  # column -> (width, format); None prints as "-"

COLUMNS: Columns = {
    "ms": (8, ".1f"),
    "p20": (8, ".1f"),
    "p80": (8, ".1f"),
    "forward": (8, ".1f"),
    "GFLOP/s": (8, ".1f"),
    "% peak": (7, ".1f"),
    "% GEMM": (7, ".1f"),
    "GB/s": (6, ".1f"),
    "+MiB": (8, ".1f"),
    "x eager": (8, ".2f"),
    "x compiled": (11, ".2f"),
    "faults": (8, "d"),
    "loss": (9, ".4f"),
}
LEGEND = """\
ms           forward + backward, median over the rounds; p20, p80: its percentiles
forward      its share up to the loss, median (linear_cross_entropy has the gradients by then)
GFLOP/s      6NCD / ms, recomputed logits not counted; "on 10 %" counts the classes it works on
% peak       of the register loop just before it: FMA for fp32, the faster of FMA and
             VDPBF16PS for bf16 and autocast
% GEMM       of torch.mm in the same type and round
GB/s         w read twice and dw written once, x and dx likewise / ms
+MiB         peak memory beyond x, w, dx, dw
x eager, x compiled   how many times faster than these in the same type and round
faults       page faults per step, median; warm buffers have few"""


def rows(config: Config, measured: Measured, memory: dict[str, float]) -> list[Row]:
    """Returns one row for each contender that ran, in the order of the contenders.

    Ratios compare two measurements of one round, and the table shows their median over the rounds.
    On a machine whose speed changes, the medians of the two need not belong to one time.
    """
    ran = [c for c in contenders(config.backend, config.only) if c.name in measured.steps]
    steps = {(c.kind, c.compute): measured.steps[c.name] for c in ran}
    table = []
    for contender in ran:
        own = measured.steps[contender.name]
        counted = work(contender, config.shape)
        row: Row = {"contender": contender.name} | times(own)
        row |= {
            "GFLOP/s": counted.flops / row["ms"] * 1e-6,
            "% peak": _percent(counted.flops, own, [step.roof for step in own]),
            "% GEMM": _percent(counted.flops, own, measured.peaks[f"gemm {contender.compute}"]),
            "GB/s": counted.bytes / row["ms"] * 1e-6,
            "+MiB": memory.get(contender.name),
            "x eager": speedup(steps.get(("eager", contender.compute)), own),
            "x compiled": speedup(steps.get(("torch.compile", contender.compute)), own),
        }
        table.append(row)
    return table


def times(steps: Sequence[Timed]) -> Row:
    """Returns what every table has of the steps of a contender."""
    milliseconds = sorted(step.ms for step in steps)
    last = len(milliseconds) - 1
    return {
        "ms": statistics.median(milliseconds),
        "p20": milliseconds[round(0.2 * last)],
        "p80": milliseconds[round(0.8 * last)],
        "forward": statistics.median(step.forward_ms for step in steps),
        "faults": int(statistics.median(step.page_faults for step in steps)),
        "loss": steps[-1].loss,
    }


def _percent(flops: int, steps: list[Step], gflops: Sequence[float | None]) -> float | None:
    known = [peak for peak in gflops if peak is not None]
    if len(known) < len(gflops):
        return None
    return statistics.median(
        100 * flops / step.ms * 1e-6 / peak for step, peak in zip(steps, known, strict=True)
    )


def speedup(baseline: Sequence[Timed] | None, steps: Sequence[Timed]) -> float | None:
    """Returns how many times faster than the baseline of the same round; the median."""
    if baseline is None:
        return None
    return statistics.median(other.ms / own.ms for other, own in zip(baseline, steps, strict=True))


def text(table: list[Row], columns: Columns) -> str:
    """Writes the rows in columns."""
    names = 2 + max(len(row["contender"]) for row in table)
    head = "".join(f"{column:>{width}}" for column, (width, _) in columns.items())
    return "\n".join([" " * names + head, *(_line(row, names, columns) for row in table)])


def _line(row: Row, names: int, columns: Columns) -> str:
    cells = (
        f"{'-' if row[column] is None else format(row[column], spec):>{width}}"
        for column, (width, spec) in columns.items()
    )
    return f"{row['contender']:<{names}}" + "".join(cells)


def peaks_text(measured: Measured) -> str:
    """Writes the peaks of the machine."""
    units = {name: "GB/s" if name in MEMORY else "GFLOP/s" for name in measured.peaks}
    return "peaks: " + ", ".join(
        f"{name} {statistics.median(rates):.1f} {units[name]}"
        for name, rates in measured.peaks.items()
    )


def floor_lines(config: Config, measured: Measured) -> list[str]:
    """Writes what 6NCD takes at the peak of the cores: no exact head can be faster than that."""
    ran = [c for c in contenders(config.backend, config.only) if c.name in measured.steps]
    n, c, d = config.shape
    lines = []
    for compute, roof in ROOFS.items():
        if roof not in measured.peaks:
            continue
        floor = 6 * n * c * d / statistics.median(measured.peaks[roof]) * 1e-6
        gains = "".join(
            f", {statistics.median(step.ms for step in measured.steps[peer.name]) / floor:.2f} x "
            f"faster than {peer.name}"
            for peer in ran
            if peer.compute == compute and peer.kind in ("eager", "torch.compile")
        )
        lines.append(f"floor, 6NCD at the peak {roof}: {floor:.1f} ms{gains}")
    return lines


def write_csv(path: Path, table: list[Row]) -> None:
    """Writes the rows to a file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
