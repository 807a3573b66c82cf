# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains, judges and keeps runs, and writes tables of them: what the parts of the study share."""

import json
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import model
import training

OUT = Path(__file__).parent / "out" / "study"
RESULTS = Path(__file__).parents[1] / "docs" / "study_results.jsonl"

EPOCHS, SEEDS, BATCH_SIZE = 22, 3, 256
METRICS = ("accuracy", "tar", "rank1")

Row = Sequence[str]


class Runs:
    """Remembers runs by their plans, and trains and judges others.

    A plan is a dict that tells runs apart. ``path`` has a line for each run: its plan and results.
    A line without a seed sums up several runs, in percent, whose own lines are lost: a loss that
    has one is trained anew only where it is asked for by name.
    """

    def __init__(self, steps: int | None):
        _, faces, images = data.load()
        self.split = data.split(faces, images)
        self.pairs = evaluate.draw_pairs(self.split)
        self.steps = steps or EPOCHS * (len(self.split.labels) // BATCH_SIZE)
        self.path = OUT / "results.jsonl" if steps else RESULTS
        OUT.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = list(map(json.loads, lines))
        self.records = {self.key(record): record for record in records if "seed" in record}
        self.earlier = {record["loss"]: record for record in records if "seed" not in record}

    @staticmethod
    def key(record: dict) -> tuple:
        """Returns the entries that tell runs apart."""
        return tuple(record[name] for name in ("part", "loss", "settings", "steps", "seed"))

    @staticmethod
    def plan(part: str, loss: str, criterion: nn.Module, steps: int, seed: int) -> dict:
        """Returns the plan of a run of a part of the study."""
        settings = " ".join(repr(criterion).split())
        settings = re.sub(r", backend='\w+'", "", settings)  # all compute the same
        return dict(part=part, loss=loss, settings=settings, steps=steps, seed=seed)

    def has(self, plan: dict) -> bool:
        """Tells whether a run has ended."""
        return self.key(plan) in self.records

    def found(self, plans: Iterable[dict]) -> dict[int, dict]:
        """Returns the records of those runs that have ended, by their seeds."""
        keys = map(self.key, plans)
        records = [self.records[key] for key in keys if key in self.records]
        return {record["seed"]: record for record in records}

    def earlier_row(self, name: str) -> list[Row]:
        """Writes the row of the runs that a line sums up, or nothing without that line."""
        if name not in self.earlier:
            return []
        record = self.earlier[name]
        cells = ["{:.2f} ± {:.2f}".format(*record[metric]) for metric in METRICS]
        return [[name, *cells, f"{record['runs']}, earlier"]]

    def weights(self, plan: dict) -> Path:
        """Names the file of a run's network and criterion."""
        name = f"{plan['part']}-{plan['loss']}".lower()
        letters = "".join(c if c.isalnum() else "-" for c in name)
        return OUT / f"{letters}-{plan['steps']}-{plan['seed']}.pt"

    def train(
        self,
        plan: dict,
        backbone: nn.Module,
        criterion: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int = BATCH_SIZE,
        steps: int | None = None,
        backbone_rate: float = training.BACKBONE_RATE,
        together: int = 1,
        facts: Mapping[str, float] | None = None,
    ) -> None:
        """Trains, judges and records with further ``facts``; ``steps``: those of the plan."""
        steps = steps or plan["steps"]
        generator = torch.Generator().manual_seed(plan["seed"])
        batches = data.batches(images, labels, batch_size, steps, generator, together)
        losses = training.train(backbone, criterion, batches, steps, backbone_rate=backbone_rate)
        name = f"{plan['loss']}, seed {plan['seed']}"
        started = time.perf_counter()
        bar = tqdm(losses, total=steps, unit="step", desc=name, mininterval=0.5)
        for value in bar:
            bar.set_postfix_str(f"loss {value:.2f}", False)
        seconds = time.perf_counter() - started
        ten_fold, all_pairs = evaluate.judge(backbone, self.split, self.pairs)
        metrics = zip(METRICS, (ten_fold.accuracy, all_pairs.tar, all_pairs.rank1), strict=True)
        record = plan | dict(metrics) | dict(seconds=round(seconds)) | dict(facts or {})
        torch.save([backbone.state_dict(), criterion.state_dict()], self.weights(plan))
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[self.key(record)] = record

    def load(self, plan: dict, backbone: nn.Module, criterion: nn.Module | None = None) -> None:
        """Restores the network of a run, and its criterion if given."""
        of_backbone, of_criterion = torch.load(self.weights(plan))
        backbone.load_state_dict(of_backbone)
        if criterion is not None:
            criterion.load_state_dict(of_criterion)


def fresh_backbone(seed: int) -> nn.Module:
    """Builds the network with the initial weights of a seed; the criterion's come next."""
    torch.manual_seed(seed)
    return model.backbone()


def metrics(record: dict) -> list[float]:
    """Returns the metrics of a run."""
    return [record[metric] for metric in METRICS]


def differences(of: Mapping[int, dict], minus: Mapping[int, dict]) -> list[list[float]]:
    """Returns the differences of the metrics between runs of one seed; the records are by seed."""
    seeds = [seed for seed in of if seed in minus]
    pairs = [zip(metrics(of[seed]), metrics(minus[seed]), strict=True) for seed in seeds]
    return [[a - b for a, b in pair] for pair in pairs]


def row(name: str, runs: Sequence[Sequence[float]]) -> list[Row]:
    """Writes mean and deviation of each metric over the runs, or nothing without runs."""
    return [[name, *map(spread, zip(*runs, strict=True)), str(len(runs))]] if runs else []


def table(heading: str, rows: Sequence[Row]) -> str:
    """Writes a table in Markdown."""
    lines = [
        [heading, "10-fold accuracy", "TAR at FAR 1e-3", "rank-1", "runs"],
        ["---", "---:", "---:", "---:", "---:"],
        *rows,
    ]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def spread(fractions: Sequence[float]) -> str:
    """Writes mean and standard deviation in percent."""
    mean = f"{100 * statistics.mean(fractions):.2f}"
    return f"{mean} ± {100 * statistics.stdev(fractions):.2f}" if len(fractions) > 1 else mean
