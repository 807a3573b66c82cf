# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains the demo's network with one loss after another and compares them on unseen characters.

    python examples/study.py                         # all losses, three seeds: hours on two cores
    python examples/study.py --only ArcFace CosFace  # trains these, and shows all that is there
    python examples/study.py --steps 40 --seeds 1    # a quick look

Each run is kept in examples/out/study as it ends: an interrupted study goes on where it was. A loss
with other settings is trained anew. After a change of network, data or training remove that folder.
The tables of the whole study go to docs/study.md, those of a part to examples/out/study.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import evaluate
import model
import training
from marginkernels import (
    AdaCos,
    AdaFace,
    AirFace,
    ArcFace,
    ASoftmax,
    CosFace,
    CurricularFace,
    MarginSoftmaxHead,
    NSoftmax,
    TripletLoss,
)

OUT = Path(__file__).parent / "out" / "study"
DOCUMENT = Path(__file__).parents[1] / "docs" / "study.md"
READING = "## Reading\n"  # the text below this heading is written by hand, and kept

EPOCHS, SEEDS, BATCH_SIZE = 22, 3, 256
METRICS = ("accuracy", "tar", "rank1")

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
    (TRIPLET, TRIPLET_START),
)

INTRODUCTION = """\
# A study of the losses

`make study` writes this page, in four hours of one core; an interrupted study goes on where it
stopped. Every loss has the demo's network and data, and the same {steps} steps of {batch_size}
images, initial weights and batches. The tables show mean and standard deviation over {seeds}, in
percent. Verification is of 2,000 characters and two handwritten designs that training never saw.

Learning rates, weight decay and clipping are those of the demo, and so is its ArcFace, whose scale
is half and whose margin two fifths of what its authors use for faces. They were not chosen for any
other loss, and there are no other characters on which they could have been. So the comparison leans
towards ArcFace and its kin; by how much, it cannot say. The losses with a scale of 64 in their
papers have the same share of scale and margin, and N-Softmax has that scale too.
Softmax, SphereFace and AdaCos have the settings of their papers. AdaFace's averages of the norms
move faster than published, because a short training has no time for 0.01. The triplet loss
(hardest positive and negative in the batch, squared distances, margin 0.2) goes on from the network
of {start}, with {triplet_steps} steps of {triplet_batch_size} images at a tenth of its rate.
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
    }


LOSSES = (*head_settings(3), TRIPLET)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help=f"batches per run, instead of {EPOCHS} epochs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each loss")
    parser.add_argument("--only", nargs="+", choices=LOSSES, metavar="LOSS", default=LOSSES,
                        help=f"losses to train: {', '.join(map(repr, LOSSES))}")  # fmt: skip
    return parser.parse_args()


class Study:
    """Runs and remembers: results.jsonl has a line for each run, beside the run's network."""

    def __init__(self, steps: int | None):
        _, faces, images = data.load()
        self.split = data.split(faces, images)
        self.pairs = evaluate.draw_pairs(self.split)
        self.steps = steps or EPOCHS * (len(self.split.labels) // BATCH_SIZE)
        self.triplet_steps = max(1, self.steps * BATCH_SIZE // TRIPLET_BATCH_SIZE // TRIPLET_SHARE)
        self.path = OUT / "results.jsonl"
        OUT.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = {self.key(record): record for record in map(json.loads, lines)}

    @staticmethod
    def key(record: dict) -> tuple:
        """Returns the entries that tell runs apart."""
        return tuple(record[name] for name in ("loss", "settings", "steps", "seed"))

    def plan(self, name: str, seed: int) -> dict:
        """Returns the record of a run, without its results."""
        settings = " ".join(repr(criterion(name, self.split.num_classes)).split())
        return dict(loss=name, settings=settings, steps=self.steps, seed=seed)

    def result(self, name: str, seed: int) -> dict | None:
        """Returns the record of a run that has ended."""
        return self.records.get(self.key(self.plan(name, seed)))

    def network(self, name: str, seed: int) -> Path:
        """Names the file of a run's network."""
        letters = "".join(c if c.isalnum() else "-" for c in name.lower())
        return OUT / f"{letters}-{self.steps}-{seed}.pt"

    def run(self, name: str, seed: int) -> None:
        """Trains, judges and records, unless that has been done."""
        if self.result(name, seed) and self.network(name, seed).exists():
            return
        torch.manual_seed(seed)
        backbone = model.backbone()
        batch_size, steps, together = BATCH_SIZE, self.steps, 1
        backbone_rate = training.BACKBONE_RATE
        if name == TRIPLET:
            self.run(TRIPLET_START, seed)
            backbone.load_state_dict(torch.load(self.network(TRIPLET_START, seed)))
            batch_size, steps = TRIPLET_BATCH_SIZE, self.triplet_steps
            backbone_rate = TRIPLET_RATE
            together = len(self.split.labels) // self.split.num_classes
        batches = data.batches(
            self.split.images, self.split.labels, batch_size, steps,
            torch.Generator().manual_seed(seed), together,
        )  # fmt: skip
        loss = criterion(name, self.split.num_classes)
        losses = training.train(backbone, loss, batches, steps, backbone_rate=backbone_rate)
        started = time.perf_counter()
        bar = tqdm(losses, total=steps, unit="step", desc=f"{name}, seed {seed}", mininterval=0.5)
        for value in bar:
            bar.set_postfix_str(f"loss {value:.2f}", False)
        seconds = time.perf_counter() - started
        ten_fold, all_pairs = evaluate.judge(backbone, self.split, self.pairs)
        metrics = zip(METRICS, (ten_fold.accuracy, all_pairs.tar, all_pairs.rank1), strict=True)
        record = self.plan(name, seed) | dict(metrics) | dict(seconds=seconds)
        torch.save(backbone.state_dict(), self.network(name, seed))
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[self.key(record)] = record

    def tables(self, seeds: int) -> str:
        """Writes tables of the losses and of their differences, as far as their runs have ended."""
        metrics = {
            (name, seed): [record[metric] for metric in METRICS]
            for name in LOSSES
            for seed in range(seeds)
            if (record := self.result(name, seed))
        }
        losses = {name: [v for (of, _), v in metrics.items() if of == name] for name in LOSSES}
        differences = {
            f"{a} minus {b}": [
                [x - y for x, y in zip(v, metrics[b, seed], strict=True)]
                for (of, seed), v in metrics.items()
                if of == a and (b, seed) in metrics
            ]
            for a, b in COMPARED
        }
        return f"{table('loss', losses)}\n{table('difference, seed by seed', differences)}"


def table(heading: str, rows: dict[str, list[list[float]]]) -> str:
    """Writes mean and deviation of each metric; the rows hold the METRICS of their runs."""
    lines = [
        f"| {heading} | 10-fold accuracy | TAR at FAR 1e-3 | rank-1 | runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in rows.items():
        if runs:
            cells = [name, *map(spread, zip(*runs, strict=True)), str(len(runs))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(fractions: Sequence[float]) -> str:
    """Writes mean and standard deviation in percent."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean


def write(path: Path, study: Study, seeds: int, tables: str) -> None:
    """Writes the page; what stands below the heading of the reading stays."""
    introduction = INTRODUCTION.format(
        steps=f"{study.steps:,}", batch_size=BATCH_SIZE, start=TRIPLET_START,
        seeds="one seed" if seeds == 1 else f"{seeds} seeds",
        triplet_steps=study.triplet_steps, triplet_batch_size=f"{TRIPLET_BATCH_SIZE:,}",
    )  # fmt: skip
    _, heading, reading = (path.read_text() if path.exists() else "").partition(READING)
    path.write_text(f"{introduction}\n{tables}" + (f"\n{heading}{reading}" if heading else ""))
    print(f"wrote {path}")


def main() -> None:
    args = arguments()
    study = Study(args.steps)
    for seed in range(args.seeds):  # every loss runs one seed first, for an early table
        for name in args.only:
            study.run(name, seed)
    tables = study.tables(args.seeds)
    print(f"\n{tables}")
    is_whole = args.steps is None and args.seeds >= SEEDS and args.only is LOSSES
    write(DOCUMENT if is_whole else OUT / "study.md", study, args.seeds, tables)


if __name__ == "__main__":
    main()
