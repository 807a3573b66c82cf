# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Draws the pictures of the demo and of the example of a million identities."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

from data import GALLERY_DESIGN, PROBE_DESIGN, Split
from evaluate import FAR, FAR_GRID, AllPairs, Pairs, TenFold

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RIGHT, WRONG, BEFORE = "#2b8a3e", "#c92a2a", "#868e96"
ACCENT, LIGHT_ACCENT = "#1864ab", "#4dabf7"
COLUMNS = 8  # sample pairs per row
ROW_HEIGHT = 0.85  # with the width of a pair as the unit

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


class History(NamedTuple):
    """Holds what the training curve shows."""

    losses: list[float]  # one per step
    checkpoints: list[int]  # steps after which the accuracy was measured
    accuracies: list[float]  # 10-fold accuracy after each of these steps


class Results(NamedTuple):
    """Holds all that the pictures and the table show."""

    history: History
    before: tuple[TenFold, AllPairs]
    after: tuple[TenFold, AllPairs]


def write(folder: Path, split: Split, pairs: Pairs, results: Results) -> list[Path]:
    """Writes pairs.png, training.png, roc.png, and summary.png with all three."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in ("pairs", "training", "roc", "summary")]

    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    draw_samples(axes, split, pairs, results.after[0])
    figure.savefig(paths[0], dpi=150)

    figure, axes = plt.subplots(2, figsize=(6, 5), layout="constrained", sharex=True)
    draw_training(axes, results)
    figure.savefig(paths[1], dpi=150)

    figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    draw_roc(axes, results)
    figure.savefig(paths[2], dpi=150)

    figure = plt.figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=(7, 4, 4))[0]
    draw_samples(left.subplots(), split, pairs, results.after[0])
    draw_training(middle.subplots(2, sharex=True), results)
    draw_roc(right.subplots(), results)
    figure.savefig(paths[3], dpi=110)
    plt.close("all")
    return paths


def draw_samples(axes: Axes, split: Split, pairs: Pairs, result: TenFold) -> None:
    """Draws rows of pairs, random and hardest, of the same and of different characters."""
    genuine, impostor = (torch.nonzero(pairs.same == same) for same in (True, False))
    rows = {
        "same,\nrandom": shuffled(genuine),
        "same,\nhardest": hardest(genuine, result.cosine, pairs),
        "different,\nrandom": shuffled(impostor),
        "different,\nhardest": hardest(impostor, -result.cosine, pairs),
    }
    top = 0.0
    for (name, chosen), count in zip(rows.items(), (2, 1, 2, 1), strict=True):
        axes.text(-0.1, top + 0.4 * count, name, ha="right", va="center", fontweight="bold")
        for i, index in enumerate(chosen[: count * COLUMNS].tolist()):
            at = (i % COLUMNS, top + ROW_HEIGHT * (i // COLUMNS))
            draw_pair(axes, split, pairs, result, tuple(index), *at)
        top += ROW_HEIGHT * count + 0.15
    axes.set(xlim=(-1.2, COLUMNS), ylim=(top, -0.05), aspect=1.0)
    axes.set_axis_off()
    axes.set_title(
        f"The same character or not? {GALLERY_DESIGN} and {PROBE_DESIGN}, both unseen in training\n"
        f"cosine, accepted above {result.threshold:.2f}; green: judged right, red: judged wrong"
    )


def shuffled(indices: Tensor) -> Tensor:
    """Returns indices (M, 2) of (fold, pair) in a random order, the same in each run."""
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


def hardest(indices: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
    """Returns indices (fold, pair), lowest key first, one for each pair of characters."""
    fold, pair = indices[key[tuple(indices.T)].argsort()].T
    characters = zip(
        pairs.gallery_character[fold, pair].tolist(),
        pairs.probe_character[fold, pair].tolist(),
        strict=True,
    )
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for at, both in zip(zip(fold.tolist(), pair.tolist(), strict=True), characters, strict=True):
        first.setdefault(both, at)
    return torch.tensor(list(first.values()))


def draw_pair(
    axes: Axes,
    split: Split,
    pairs: Pairs,
    result: TenFold,
    at: tuple[int, int],
    column: int,
    top: float,
) -> None:
    """Draws a pair, gallery image on the left, with its cosine below."""
    left = split.gallery[pairs.gallery_face[at], pairs.gallery_character[at]]
    right = split.probe[pairs.probe_face[at], pairs.probe_character[at]]
    image = 1 - torch.cat([left, torch.zeros(32, 2), right], 1).numpy()
    cosine = result.cosine[at].item()
    is_right = (cosine > result.threshold) == pairs.same[at].item()
    color = RIGHT if is_right else WRONG
    x, y, width, height = column + 0.04, top, 0.92, 0.92 * 32 / 66
    axes.imshow(image, cmap="gray", extent=(x, x + width, y + height, y), interpolation="nearest")
    axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.2))
    axes.text(x + width / 2, y + height + 0.17, f"{cosine:.2f}", ha="center", va="center",
              color=color)  # fmt: skip


def draw_training(axes: np.ndarray, results: Results) -> None:
    """Draws the loss above and the verification accuracy below, against the step."""
    upper, lower = axes
    history = results.history
    losses = np.array(history.losses)
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    upper.plot(np.arange(1, len(losses) + 1), losses, color=ACCENT, alpha=0.25, linewidth=0.7)
    upper.plot(np.arange(len(smooth)) + 1 + window / 2, smooth, color=ACCENT)
    upper.set(ylabel="training loss", title="Training", ylim=(0, None))
    lower.plot(history.checkpoints, [100 * a for a in history.accuracies], "o-", color=RIGHT,
               markersize=3.5)  # fmt: skip
    lower.set(xlabel="step", ylabel="10-fold accuracy, %\n(unseen characters and faces)")
    for each in axes:
        each.grid(alpha=0.3)


def draw_roc(axes: Axes, results: Results) -> None:
    """Draws the true against the false accept rate, before and after training."""
    for name, (_, all_pairs), color in (
        ("untrained", results.before, BEFORE),
        ("trained", results.after, ACCENT),
    ):
        label = f"{name}: AUC {all_pairs.auc:.4f}\n{all_pairs.tar:.3f} at FAR $10^{{-3}}$"
        axes.plot(FAR_GRID, all_pairs.roc, color=color, linewidth=2, label=label)
        axes.plot([FAR], [all_pairs.tar], "o", color=color)
    axes.set(xscale="log", xlim=(FAR_GRID[0], 1), ylim=(0, 1.02))
    axes.set(xlabel="false accept rate", ylabel="true accept rate", title="Verification ROC")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


class Growth(NamedTuple):
    """Holds time and memory of a step for one head, by the number of classes."""

    label: str
    processor_seconds: dict[int, float]
    peaks: dict[int, int]  # bytes
    stopped: list[int]  # numbers of classes at which the head ran out of memory
    lasting: float  # bytes per class of weights, gradient and optimizer state


def draw_growth(path: Path, heads: list[Growth], limit: float, title: str) -> None:
    """Draws time and memory of a step against the number of classes.

    Args:
        limit: GiB that the heads may use.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for head, color in zip(heads, (RIGHT, ACCENT, LIGHT_ACCENT, BEFORE), strict=True):
        style = dict(color=color, marker="o", markersize=4, linewidth=2, label=head.label)
        left.plot(list(head.processor_seconds), list(head.processor_seconds.values()), **style)
        right.plot(list(head.peaks), [peak / 2**30 for peak in head.peaks.values()], **style)
        floor = [classes * head.lasting / 2**30 for classes in head.peaks]
        right.plot(list(head.peaks), floor, ":", color=color)
        right.plot(head.stopped[:1], [limit] * len(head.stopped[:1]), "x", color=color)
    right.plot([], [], ":", color="black", label="weights, gradient, momentum")
    right.plot([], [], "x", color="black", label=f"stopped at {limit:g} GiB")
    left.set(xscale="log", yscale="log", xlabel="identities", ylabel="processor seconds")
    left.set_title(title)
    right.set(xscale="log", yscale="log", xlabel="identities", ylabel="GiB")
    right.set_title("Peak resident memory of the process")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=130)
