# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Predicts the time of a training step on GPUs, and compares it with a measurement.

python -m tools.model                    # steps of all GPUs before and now, and the goals
python -m tools.model --kernels H100 1024 1000000 512 --weights bfloat16 --optimizer fused
python -m tools.model --measured         # beside what was measured on one H200
python -m tools.model --docs             # writes the tables of docs/gpu_model.md
python -m tools.model --compile          # after a change of kernels or tiles: counts again
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from . import code, tables
from .gpus import GPUS

PAGE = Path(__file__).parents[2] / "docs" / "gpu_model.md"
TABLES: dict[str, Callable[[], list[str]]] = {
    "assumptions": tables.assumptions,
    "constants": tables.constants,
    "measured triton": lambda: tables.steps("triton"),
    "measured native": lambda: tables.steps("native"),
    "tiles": tables.tiles,
    "gemms": tables.gemms,
    "predicted first": tables.predicted_first,
    "goals": tables.goals,
    "totals triton": lambda: tables.totals("triton"),
    "totals native": lambda: tables.totals("native"),
    "launches triton": lambda: tables.launches("triton"),
    "launches native": lambda: tables.launches("native"),
    "kernels": lambda: tables.kernels("H100", "triton", tables.SHAPES[0], "bfloat16", "fused"),
    "changes": tables.changes,
}
NOW = ("goals", "totals triton", "launches triton", "totals native", "launches native")


def main() -> None:
    """Prints tables, or writes files."""
    parser = argparse.ArgumentParser(
        "python -m tools.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs=4, metavar=("GPU", "N", "C", "D"))
    parser.add_argument("--weights", choices=tables.WEIGHTS, default="float32")
    parser.add_argument("--backend", choices=("triton", "native"), default="triton")
    parser.add_argument("--optimizer", choices=("", "SGD", "fused"), default="")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.compile:
        code.write(code.compile_all(sorted({gpu.arch for gpu in GPUS.values()})))
    elif options.docs:
        PAGE.write_text(page(PAGE.read_text()))
    elif options.kernels:
        gpu, *sizes = options.kernels
        shape = tuple(map(int, sizes))
        show(tables.kernels(gpu, options.backend, shape, options.weights, options.optimizer))
    else:
        names = [name for name in TABLES if name not in NOW] if options.measured else NOW
        for name in names:
            print(f"\n{name}")
            show(TABLES[name]())


def show(table: list[str]) -> None:
    """Prints a table in columns."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def page(text: str) -> str:
    """Returns the page with each table between its marks made again."""

    def table(found: re.Match[str]) -> str:
        return "\n".join([found[1], *TABLES[found[2]](), "<!-- end -->"])

    return re.sub(r"(<!-- table: ([\w ]+) -->)\n.*?<!-- end -->", table, text, flags=re.S)


if __name__ == "__main__":
    main()
