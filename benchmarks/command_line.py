# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the options that the benchmarks of one shape share."""

import argparse
from pathlib import Path


def parser(benchmark: str, description: str | None, who: str) -> argparse.ArgumentParser:
    """Makes a parser with the shared options.

    Args:
        benchmark: the name of the module.
        description: what ``--help`` prints first.
        who: takes turns in the benchmark, in the plural.
    """
    made = argparse.ArgumentParser(
        f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--shape", type=int, nargs=3, metavar=("N", "C", "D"), default=(256, 100_000, 512)
    )
    made.add_argument("--only", nargs="+", help=f"{who} whose name contains one of these")
    made.add_argument("--repeats", type=int, default=11, help="rounds (default: %(default)s)")
    made.add_argument("--backend", default="native", help="this library's (default: native)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--csv", type=Path, help="also write the rows to this file")
    return made
