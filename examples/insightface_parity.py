# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with insightface's head in plain PyTorch and with ours, and draws both loss curves.

    python examples/insightface_parity.py     # some minutes on two cores

All runs are those of insightface_train.py, with the same seeds and data, in fp32: 300 steps on the
demo's characters, for CosFace and for ArcFace. The plain head takes insightface's steps: cosines,
clamp, margin, scale, softmax. A network in training multiplies differences of rounding, so that a
third run shows how far: the plain head's, with class weights that start one rounding longer.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import insightface_config
from insightface_config import Config
from insightface_train import SCALE, Trainer
from marginkernels.compat.insightface import LOSS_CAP, PartialFC_V2

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from plots import ACCENT, BEFORE

PICTURE = Path(__file__).parents[1] / "docs" / "insightface_parity.png"
MARGINS = {"CosFace, m = 0.4": (1.0, 0.0, 0.4), "ArcFace, m = 0.5": (1.0, 0.5, 0.0)}
SETTINGS = dict(
    network="demo", embedding_size=128, rec="hanzi", num_classes=4355, num_image=17420,
    batch_size=116, num_epoch=2, warmup_epoch=0.5, optimizer="adamw", lr=3e-4, weight_decay=0.1,
    num_workers=0, output="",
)  # fmt: skip
ROUNDING = 1 + 2**-23  # the cosines of longer class weights are the same
Curve = list[float]


class PlainPartialFC(PartialFC_V2):
    """Computes in one process what insightface does, with all logits, and autograd's gradients."""

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Returns the mean loss of the rows."""
        cosines = F.linear(F.normalize(local_embeddings), F.normalize(self.weight)).clamp(-1, 1)
        loss: Any = self.margin_softmax
        rows = torch.arange(len(local_labels))
        target = cosines.detach()[rows, local_labels]
        with_margin = target - loss.m3 if loss.m3 > 0 else torch.cos(torch.acos(target) + loss.m2)
        # insightface takes the margin under no_grad: its derivative is that of the cosine
        margin = torch.zeros_like(cosines).index_put((rows, local_labels), with_margin - target)
        losses = F.cross_entropy(SCALE * (cosines + margin), local_labels, reduction="none")
        return (losses - (losses.detach() - LOSS_CAP).clamp_min(0)).mean()


class Curves(NamedTuple):
    """Holds the losses of the three runs with one margin."""

    plain: Curve
    ours: Curve
    rounded: Curve  # of the plain head with other roundings


def curve(
    config: Config, head_type: type[PartialFC_V2], steps: int, name: str, longer: float = 1.0
) -> Curve:
    """Trains, and returns the loss of each step; class weights start ``longer`` times as long."""
    trainer = Trainer(config, torch.device("cpu"), head_type)
    with torch.no_grad():
        trainer.head.weight.mul_(longer)
    losses: Curve = []
    bar = tqdm(total=steps, unit="step", desc=name, mininterval=0.5)
    while len(losses) < steps:
        for loss in trainer.train_epoch():
            losses.append(loss.item())
            bar.update()
            if len(losses) == steps:
                break
    bar.close()
    return losses


def draw(path: Path, margins: dict[str, Curves]) -> None:
    """Draws both losses above, and relative differences below, for each margin."""
    figure, axes = plt.subplots(
        2, len(margins), figsize=(9, 4.8), layout="constrained", sharex=True, sharey="row",
        height_ratios=(2, 1), squeeze=False,
    )  # fmt: skip
    for (name, (plain, ours, rounded)), (upper, lower) in zip(margins.items(), axes.T, strict=True):
        step = np.arange(1, len(ours) + 1)
        upper.plot(step, plain, color=BEFORE, linewidth=4, alpha=0.5, label="plain PyTorch")
        upper.plot(step, ours, color=ACCENT, linewidth=1, label="marginkernels")
        upper.set_title(name)
        for other, color, label in (
            (rounded, BEFORE, "plain PyTorch, other roundings"),
            (ours, ACCENT, "marginkernels"),
        ):
            difference = np.maximum(differences(plain, other), 1e-8)
            lower.plot(step, difference, color=color, linewidth=1, label=label)
        lower.set(xlabel="step", yscale="log")
    axes[0, 0].set(ylabel="training loss")
    axes[0, 0].legend()
    axes[1, 0].set(ylabel="relative difference\nto plain PyTorch")
    axes[1, 0].legend(fontsize=7)
    for each in axes.flat:
        each.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def differences(plain: Curve, other: Curve) -> np.ndarray:
    """Returns the relative difference at each step."""
    return np.abs(np.array(plain) - np.array(other)) / np.array(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    args = parser.parse_args()
    margins = {}
    for name, margin_list in MARGINS.items():
        config = insightface_config.checked(SETTINGS | {"margin_list": margin_list})
        found = margins[name] = Curves(
            curve(config, PlainPartialFC, args.steps, f"{name}, plain"),
            curve(config, PartialFC_V2, args.steps, f"{name}, ours"),
            curve(config, PlainPartialFC, args.steps, f"{name}, plain", ROUNDING),
        )
        print(f"{name}: loss {found.plain[0]:.2f} to {found.plain[-1]:.2f}")
        for kind, other in (("ours", found.ours), ("other roundings", found.rounded)):
            apart = differences(found.plain, other)
            print(f"  {kind:16}{apart[:10].max():.1e} apart at most in the first 10 steps, "
                  f"{apart.max():.1e} in all, {apart.mean():.1e} on average")  # fmt: skip
    draw(args.out, margins)


if __name__ == "__main__":
    main()
