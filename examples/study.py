# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains the demo's network with one loss after another and compares them on unseen characters.

    python examples/study.py                         # all that docs/study_results.jsonl lacks
    python examples/study.py --only ArcFace CosFace  # trains these, and shows all that is there
    python examples/study.py --steps 40 --seeds 1    # a quick look

Each run is kept as it ends: an interrupted study goes on where it was. A loss with other settings
is trained anew. After a change of network, data or training remove docs/study_results.jsonl.
Runs with another number of steps, and their tables, go to examples/out/study.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

import model
import training
import wrong_labels
from marginkernels import (
    AdaCos,
    AdaFace,
    AirFace,
    ArcFace,
    ASoftmax,
    Circle,
    CosFace,
    CurricularFace,
    InterTopK,
    MarginSoftmaxHead,
    NSoftmax,
    SphereFace2,
    TripletLoss,
)
from runs import BATCH_SIZE, OUT, SEEDS, Runs, differences, fresh_backbone, metrics, row, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "study.md"
READING = "## Reading\n"  # the text below this heading is written by hand, and kept

PART = "losses"

TRIPLET, TRIPLET_START = "N-Softmax, then triplet", "N-Softmax"
# large batches of whole characters, because the hardest negatives in small batches are easy
TRIPLET_BATCH_SIZE, TRIPLET_RATE = 1024, 0.1 * training.BACKBONE_RATE
TRIPLET_SHARE = 4  # the triplets see a fourth of the images that a whole training sees

# differences between runs of one seed, which the reading is about
COMPARED = (
    ("N-Softmax", "Softmax"),
    ("ArcFace, hard", "N-Softmax"),
    ("ArcFace, easy", "ArcFace, hard"),
    ("AdaCos", "N-Softmax"),
    ("AdaCos", "ArcFace, hard"),
    ("AdaFace", "ArcFace, hard"),
    ("AdaFace", "CosFace"),
    ("ArcFace, sub-centres", "ArcFace, hard"),
    ("ArcFace, top-k", "ArcFace, hard"),
    ("Circle", "ArcFace, hard"),
    ("SphereFace2", "ArcFace, hard"),
    (TRIPLET, TRIPLET_START),
)

INTRODUCTION = """\
# A study of the losses

`make study` writes this page from [the records](study_results.jsonl), and first trains what they
lack. A run takes two to eight minutes of one core, all of them hours. Every loss has the demo's
network and data, and the same {steps} steps of {batch_size} images, initial weights and batches.
The tables show mean and standard deviation in percent, over as many seeds as runs. Verification is
of 2,000 characters and two handwritten designs that training never saw.

Of "earlier" runs, only what the tables show is kept. They had another version of the project and
the same settings, steps and seeds. No difference between a run of theirs and a later one is shown.

Learning rates, weight decay and clipping are those of the demo, and so is its ArcFace, whose scale
is half and whose margin two fifths of what its authors use for faces. They were not chosen for any
other loss, and there are no other characters on which they could have been. So the comparison leans
towards ArcFace and its kin; by how much, it cannot say. The losses with a scale of 64 in their
papers have the same share of scale and margin, and N-Softmax has that scale too. Softmax,
SphereFace, AdaCos, Circle and SphereFace2 have the settings of their authors. Sub-centres (3 of
each class) and the penalty on the 5 nearest classes (0.06, as published for this scale and margin)
are put on "ArcFace, hard". AdaFace's averages of the norms move faster than published, because a
short training has no time for 0.01. The triplet loss (hardest positive and negative in the batch,
squared distances, margin 0.2) goes on from the network of {start}, with {triplet_steps} steps of
{triplet_batch_size} images at a tenth of its rate.
"""


def criterion(name: str, num_classes: int) -> nn.Module:
    """Builds a fresh criterion, (embeddings, labels) -> loss."""
    if name == TRIPLET:
        return TripletLoss()
    return MarginSoftmaxHead(model.EMBEDDING_SIZE, num_classes, **head_settings(num_classes)[name])


def head_settings(num_classes: int) -> dict[str, dict]:
    """Returns the settings of each loss's head, by its name."""
    scale = 32.0
    return {
        "Softmax": dict(margin=NSoftmax(), scale=1.0, normalize="none", bias=True),
        "N-Softmax": dict(margin=NSoftmax(), scale=scale),
        "SphereFace": dict(margin=ASoftmax(4), scale=1.0, normalize="weight"),
        "CosFace": dict(margin=CosFace(0.14), scale=scale),
        "ArcFace, easy": dict(margin=ArcFace(0.2, branch="easy"), scale=scale),
        "ArcFace, hard": dict(margin=ArcFace(0.2, branch="hard"), scale=scale),
        "AirFace": dict(margin=AirFace(0.16), scale=scale),
        "AdaCos": dict(margin=NSoftmax(), scale=AdaCos(num_classes)),
        "CurricularFace": dict(margin=CurricularFace(0.2), scale=scale),
        # AdaFace's averages start far from these norms; t_alpha = 0.01 is too slow in a short run
        "AdaFace": dict(margin=AdaFace(0.16, t_alpha=0.1), scale=scale),
        "ArcFace, sub-centres": dict(
            margin=ArcFace(0.2, branch="hard"), scale=scale, sub_centers=wrong_labels.SUB_CENTERS
        ),
        "ArcFace, top-k": dict(margin=InterTopK(ArcFace(0.2, branch="hard")), scale=scale),
        "Circle": dict(margin=Circle(0.25), scale=256.0),
        "SphereFace2": dict(margin=sphereface2(num_classes, scale=40.0), scale=40.0),
    }


def sphereface2(num_classes: int, scale: float) -> SphereFace2:
    """Builds the margin with its authors' settings, among them the bias it starts from."""
    return SphereFace2(bias=SphereFace2().first_bias(num_classes, scale), weight=50 / scale)


LOSSES = (*head_settings(3), TRIPLET)
CHOICES = (*LOSSES, wrong_labels.PART)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="batches per run, instead of those of the study")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each loss")
    parser.add_argument("--only", nargs="+", choices=CHOICES, metavar="LOSS",
                        help=f"what to train: {', '.join(map(repr, CHOICES))}")  # fmt: skip
    return parser.parse_args()


class Losses:
    """Trains each loss on right labels, and writes the tables of that part of the study."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.triplet_steps = max(1, runs.steps * BATCH_SIZE // TRIPLET_BATCH_SIZE // TRIPLET_SHARE)

    def plan(self, name: str, seed: int) -> dict:
        """Returns the plan of a run."""
        head = criterion(name, self.runs.split.num_classes)
        return self.runs.plan(PART, name, head, self.runs.steps, seed)

    def run(self, name: str, seed: int) -> None:
        """Trains, judges and records, unless that has been done."""
        if not self.runs.has(self.plan(name, seed)):
            self.train(name, seed)

    def train(self, name: str, seed: int) -> None:
        """Trains, judges and records."""
        plan, split = self.plan(name, seed), self.runs.split
        backbone = fresh_backbone(seed)
        options: dict[str, Any] = {}
        if name == TRIPLET:
            start = self.plan(TRIPLET_START, seed)
            if not self.runs.weights(start).exists():
                self.train(TRIPLET_START, seed)
            self.runs.load(start, backbone)
            options = dict(
                batch_size=TRIPLET_BATCH_SIZE,
                steps=self.triplet_steps,
                backbone_rate=TRIPLET_RATE,
                together=len(split.labels) // split.num_classes,
            )
        loss = criterion(name, split.num_classes)
        self.runs.train(plan, backbone, loss, split.images, split.labels, **options)

    def tables(self, seeds: int) -> str:
        """Writes tables of the losses and of their differences, as far as their runs have ended."""
        plans = {name: [self.plan(name, seed) for seed in range(seeds)] for name in LOSSES}
        of = {name: self.runs.found(each) for name, each in plans.items()}
        losses, compared = [], []
        for name, records in of.items():
            losses += self.runs.earlier_row(name) + row(name, list(map(metrics, records.values())))
        for a, b in COMPARED:
            name = f"{a} minus {b}"
            compared += self.runs.earlier_row(name) + row(name, differences(of[a], of[b]))
        return f"{table('loss', losses)}\n{table('difference, seed by seed', compared)}"


def write(path: Path, losses: Losses, seeds: int) -> None:
    """Writes the page; what stands below the heading of the reading stays."""
    introduction = INTRODUCTION.format(
        steps=f"{losses.runs.steps:,}", batch_size=BATCH_SIZE, start=TRIPLET_START,
        triplet_steps=losses.triplet_steps, triplet_batch_size=f"{TRIPLET_BATCH_SIZE:,}",
    )  # fmt: skip
    page = f"{introduction}\n{losses.tables(seeds)}\n{wrong_labels.section(losses.runs, seeds)}"
    _, heading, reading = (path.read_text() if path.exists() else "").partition(READING)
    path.write_text(page + (f"\n{heading}{reading}" if heading else ""))
    print(f"{page}\nwrote {path}")


def main() -> None:
    args = arguments()
    runs = Runs(args.steps)
    losses = Losses(runs)
    chosen = args.only or [name for name in CHOICES if name not in runs.earlier]
    for seed in range(args.seeds):  # every loss runs one seed first, for an early table
        for name in chosen:
            if name == wrong_labels.PART:
                wrong_labels.run_all(runs, seed)
            else:
                losses.run(name, seed)
    write(OUT / "study.md" if args.steps else DOCUMENT, losses, args.seeds)


if __name__ == "__main__":
    main()
