# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures the fused head against what people run today: time, share of the peaks, memory.

    python -m benchmarks.head            # four tables, warm and fresh, huge pages off and on
    python -m benchmarks.head --quick    # the first of them, without the memory column
    python -m benchmarks.head --memory   # peak memory alone, at a million classes too

The operands are fp32, and the head is ArcFace (m = 0.5, s = 64). "bf16" is this library's compute
type; its peers compute in bf16 under "autocast". Every table comes from one process, in which the
contenders take turns.
"""

import argparse

from . import command_line, process, table
from .contenders import Shape, contenders
from .machine import header, provenance
from .memory import beyond_gradients, extra_peaks
from .process import Memory
from .sweeps import Config, Measured, measure

MILLION = Shape(256, 1_000_000, 512)
SETTINGS = [Memory(warm, huge_pages) for huge_pages in (False, True) for warm in (True, False)]


def main() -> None:
    """Prints the tables that were asked for."""
    options = parse_options()
    if not contenders(options.backend, options.only):
        raise SystemExit(f"no contender's name contains one of {options.only}")
    shape = Shape(*options.shape)
    print(header(options.device))
    if options.memory:
        print_memory(shape, options)
        return
    extra: dict[str, float] = {}
    if not options.quick:
        extra, _ = peaks(shape, options, options.only)
    exported = []
    for memory in SETTINGS[:1] if options.quick or options.device != "cpu" else SETTINGS:
        asked = (shape, options.device, options.backend, options.only, options.repeats)
        config = Config(*asked, memory)
        measured = process.in_child(memory.environment(), measure, config)
        rows = table.rows(config, measured, extra)
        print_table(config, measured, rows)
        n, c, d = shape
        setting = {"N": n, "C": c, "D": d, "memory": str(memory)}
        exported += [provenance(options.device) | setting | row for row in rows]
    print("\n" + table.LEGEND)
    if options.csv and exported:
        table.write_csv(options.csv, exported)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line.parser("head", __doc__, "contenders")
    parser.add_argument("--quick", action="store_true", help="warm buffers, no huge pages, no +MiB")
    parser.add_argument("--memory", action="store_true", help="peak memory only")
    return parser.parse_args()


def peaks(
    shape: Shape, options: argparse.Namespace, only: list[str] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns peak MiB by contender, and the reason for those that do not run."""
    names = [contender.name for contender in contenders(options.backend, only)]
    return extra_peaks(names, beyond_gradients, shape, options.device, options.backend)


def print_table(config: Config, measured: Measured, rows: list[table.Row]) -> None:
    """Prints one table, with its setting and the peaks of the machine."""
    print(f"\n(N, C, D) = {tuple(config.shape)}, {config.memory}, {config.repeats} rounds")
    print("\n".join([table.peaks_text(measured), *table.floor_lines(config, measured)]))
    if rows:
        print(table.text(rows, table.COLUMNS))
    print_skipped(measured.skipped)


def print_memory(shape: Shape, options: argparse.Namespace) -> None:
    """Prints peak memory at the given shape, and at a million classes."""
    # at a million classes the peers need more than many machines have
    for asked, only in ((shape, options.only), (MILLION, ["recompute"])):
        found, skipped = peaks(asked, options, only)
        print(f"\n(N, C, D) = {tuple(asked)}: peak MiB beyond x, w, dx, dw")
        for name, mib in found.items():
            print(f"{name:<32}{mib:10.1f}")
        print_skipped(skipped)


def print_skipped(skipped: dict[str, str]) -> None:
    """Prints who was left out, and why."""
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")


if __name__ == "__main__":
    main()
