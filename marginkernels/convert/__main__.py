# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Converts checkpoints of one project into those of another, and to another number of ranks."""

import argparse
import sys

from . import FORMATS, convert

_EXAMPLES = """examples:
  eight files of insightface for three GPUs, momentum and backbone included:
    python -m marginkernels.convert run/checkpoint_gpu_*.pt run3 --to insightface --world-size 3
  the same for any number of ranks of marginkernels:
    python -m marginkernels.convert run/checkpoint_gpu_*.pt run3 --to distributed
  classes that a cleaned data set no longer has:
    python -m marginkernels.convert loss.pt clean.pt --to metric-learning --classes table.csv
"""


def main() -> int:
    """Runs the command, and returns its exit code."""
    arguments = vars(_parser().parse_args())
    try:
        lines = convert(**arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m marginkernels.convert", description=__doc__, epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ", ".join(FORMATS)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="the files of all ranks, or one file, or a folder")
    add("output", metavar="OUT", help="a new file, or folder, as the format has it")
    add("--to", required=True, metavar="FORMAT", help=f"one of {names}")
    add(
        "--from", dest="source", metavar="FORMAT",
        help="the format of IN; by default it is told from the names in the files",
    )  # fmt: skip
    add("--key", help="the name of the class weights in IN, where it is not the usual one")
    add(
        "--world-size", type=int, default=1, metavar="N",
        help="the number of ranks to write, for insightface; default 1",
    )  # fmt: skip
    add("--num-classes", type=int, metavar="C", help="the number of classes that IN must have")
    add(
        "--classes", metavar="TABLE",
        help="the new class of each old one, -1 to drop it: .npy, .pt, lines of one, or of old,new",
    )  # fmt: skip
    add(
        "--sub-centers", type=int, default=1, metavar="K",
        help="the number of centres that each class has in IN; default 1",
    )  # fmt: skip
    add(
        "--reduce", metavar="mean|COUNTS",
        help="leave one centre of each class: their mean, or that with the greatest count (C, K)",
    )  # fmt: skip
    add("--drop-state", action="store_true", help="leave out the optimizer's state of the classes")
    add("--overwrite", action="store_true", help="replace OUT where it is a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
