# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Draws the shares of the floor that benchmarks.heat measured."""

from pathlib import Path

import matplotlib

from .table import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage


def draw(rows: list[Row], path: Path, title: str) -> Path:
    """Writes a map for each compute type and number of features; cells are N by C."""
    computes = list(dict.fromkeys(row["contender"] for row in rows))
    features = sorted({row["D"] for row in rows})
    figure, panels = plt.subplots(
        len(computes), len(features), figsize=(3.2 * len(features), 2.6 * len(computes)),
        layout="constrained", sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for line, compute in zip(panels, computes, strict=True):
        for axes, d in zip(line, features, strict=True):
            image = draw_panel(axes, rows, compute, d)
    for axes in panels[-1]:
        axes.set_xlabel("classes")
    for axes in panels[:, 0]:
        axes.set_ylabel("batch")
    figure.colorbar(image, ax=panels, label="% of the floor", shrink=0.8)
    figure.suptitle(f"forward and backward, {title}; m: bound by memory", fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def draw_panel(axes: Axes, rows: list[Row], compute: str, d: int) -> AxesImage:
    """Draws one map; a size that was not measured stays white."""
    batches, classes = (sorted({row[name] for row in rows}) for name in "NC")
    shares = [[float("nan")] * len(classes) for _ in batches]
    for row in rows:
        if row["contender"] != compute or row["D"] != d:
            continue
        y, x = batches.index(row["N"]), classes.index(row["C"])
        shares[y][x] = row["% of floor"]
        text = f"{row['% of floor']:.0f}{'m' if row['bound by'] == 'memory' else ''}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(classes)), [f"{c:,}" for c in classes], rotation=30)
    axes.set_yticks(range(len(batches)), [str(n) for n in batches])
    axes.set_title(f"{compute}, {d} features", fontsize=9)
    return axes.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", origin="lower", aspect="auto")
