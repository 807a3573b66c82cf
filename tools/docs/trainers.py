# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Writes the table of docs/trainers.md from the runs that docs/trainers.jsonl records.

``make trainers`` makes the runs, and calls this: ``python -m tools.docs.trainers``.
"""

import json
import re
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[2] / "docs" / "trainers.md"
RECORDS = PATH.with_suffix(".jsonl")
COLUMNS = (
    "example", "classes", "steps", "losses differ by", "its head, ms", "ours, ms", "its head, MiB",
    "ours, MiB",
)  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Returns the table, a row for each trainer and number of classes."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(_row, records)]
    return "\n".join(lines)


def _row(record: dict[str, Any]) -> str:
    original, ours = record["original"], record["ours"]
    classes = record["classes"] or 4355
    return (
        f"| `{record['trainer']}.py` | {classes:,} "
        f"| {record['steps']} | {record['difference']:.0e} "
        f"| {original['milliseconds']:.0f} | {ours['milliseconds']:.0f} "
        f"| {original['mib']:.0f} | {ours['mib']:.0f} |"
    )


def document() -> str:
    """Returns the page with the table of the records."""
    records = list(map(json.loads, RECORDS.read_text().splitlines()))
    records.sort(key=lambda record: (record["trainer"], record["classes"] or 0))
    return re.sub(
        r"(<!-- table -->\n).*?(?=<!-- end -->)",
        lambda found: f"{found[1]}{table(records)}\n",
        PATH.read_text(),
        flags=re.S,
    )


if __name__ == "__main__":
    PATH.write_text(document())
