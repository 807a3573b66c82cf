# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Draws time and memory of the whole step against the number of classes."""

from pathlib import Path

import matplotlib

from .table import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[1] / "docs"
OURS, PEERS = ("#1864ab", "#4dabf7", "#2b8a3e"), ("#c92a2a", "#e8590c", "#868e96", "#adb5bd")
# by compute type: this library's, then its peers
SHOWN = {
    "fp32": (
        ["marginkernels fp32, fused", "marginkernels fp32, SGD"],
        ["eager fp32", "torch.compile fp32", "eager on 10 % fp32"],
    ),
    "bf16": (
        ["marginkernels bf16, fused", "marginkernels bf16, SGD",
         "marginkernels bf16, fused, bf16 weights"],
        ["eager autocast", "torch.compile autocast", "eager on 10 % autocast"],
    ),
}  # fmt: skip

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def draw(rows: list[Row], busy: bool) -> list[Path]:
    """Writes step_time.png, and step_memory.png where memory was measured."""
    paths = []
    time = ("busy", "ms on each processor") if busy else ("ms", "ms of a whole step")
    memory = ("+MiB", "peak MiB beyond x and the weights")
    for name, (column, label) in {"step_time": time, "step_memory": memory}.items():
        known = [row for row in rows if row[column] is not None]
        if not known:
            continue
        figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharey=True)
        for axes, compute in zip(panels, SHOWN, strict=True):
            draw_panel(axes, known, compute, column)
        panels[0].set_ylabel(label)
        paths.append(FOLDER / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def draw_panel(axes: Axes, rows: list[Row], compute: str, column: str) -> None:
    """Draws a line for each of the heads that compute in this type."""
    for names, colors, style in zip(SHOWN[compute], (OURS, PEERS), ("o-", "s--"), strict=True):
        for name, color in zip(names, colors, strict=False):
            values = {row["C"]: row[column] for row in rows if row["contender"] == name}
            axes.plot([*values], [*values.values()], style, color=color, markersize=4, label=name)
    first = rows[0]
    title = f"{compute}, batch {first['N']}, {first['D']} features"
    axes.set(xscale="log", yscale="log", xlabel="classes", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=7)
