# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with wrong labels: the part of the study that compares what was made for them."""

import math
from typing import Any

from torch import Tensor

import data
import evaluate
import model
from marginkernels import ArcFace, InterClassFilter, MarginSoftmaxHead
from runs import Runs, differences, fresh_backbone, metrics, row, table

PART = "wrong labels"
SHARE = 0.2  # of the labels
SCALE, SUB_CENTERS, DEGREES, THRESHOLD = 32.0, 3, 75, 0.4

PLAIN, CENTERS, FILTER = "ArcFace", "ArcFace, sub-centres", "ArcFace, filter"
CLEANED = "ArcFace, on what sub-centres keep"
RIGHT = "ArcFace, right labels"
LOSSES = (PLAIN, CENTERS, FILTER, CLEANED, RIGHT)

INTRODUCTION = """\
## Wrong labels

Now {share:.0%} of the training labels name another class, drawn at random, the same for every loss
of a seed. All have margin and scale of "ArcFace, hard" above, its network, batches and rates, and
half its steps, {steps:,}. The filter leaves out other classes whose cosine is above {threshold}: a
cosine needs no scaling, so that is the published number. Sub-centres give each class {sub_centers}
centres. "{cleaned}" follows the authors of sub-centres.
It drops the images more than {degrees} degrees from the centre that most images of their class
choose, and trains ArcFace anew on the others, as many steps again. "{right}"
has no wrong label: its difference is what they cost.
"""


def criterion(name: str, num_classes: int) -> MarginSoftmaxHead:
    """Builds a fresh head."""
    options: dict[str, Any] = dict(margin=ArcFace(0.2, branch="hard"))
    if name == CENTERS:
        options |= dict(sub_centers=SUB_CENTERS)
    if name == FILTER:
        options |= dict(margin=InterClassFilter(options["margin"], THRESHOLD))
    return MarginSoftmaxHead(model.EMBEDDING_SIZE, num_classes, scale=SCALE, **options)


def plan(runs: Runs, name: str, seed: int) -> dict:
    """Returns the plan of a run."""
    head = criterion(name, runs.split.num_classes)
    return runs.plan(PART, name, head, runs.steps // 2, seed)


def run_all(runs: Runs, seed: int) -> None:
    """Trains, judges and records all of a seed, except where that has been done."""
    for name in LOSSES:
        if not runs.has(plan(runs, name, seed)):
            run(runs, name, seed)


def run(runs: Runs, name: str, seed: int) -> None:
    """Trains, judges and records."""
    split = runs.split
    images, labels = split.images, split.labels
    if name != RIGHT:
        labels = data.with_wrong_labels(split, SHARE, seed)
    facts = {}
    if name == CLEANED:
        kept = clean(runs, labels, seed)
        wrong = labels != split.labels
        lost = dict(wrong_removed=wrong & ~kept, right_removed=~wrong & ~kept)
        facts = {fact: int(rows.sum()) for fact, rows in lost.items()}
        images, labels = images[kept], labels[kept]
    backbone = fresh_backbone(seed)
    head = criterion(name, split.num_classes)
    runs.train(plan(runs, name, seed), backbone, head, images, labels, facts=facts)


def clean(runs: Runs, labels: Tensor, seed: int) -> Tensor:
    """Returns a mask of the images that the run with sub-centres keeps."""
    trained = plan(runs, CENTERS, seed)
    if not runs.weights(trained).exists():
        run(runs, CENTERS, seed)
    backbone, head = model.backbone(), criterion(CENTERS, runs.split.num_classes)
    runs.load(trained, backbone, head)
    embeddings = evaluate.embed(backbone, runs.split.images.transpose(0, 1))[0]
    head.center_counts(embeddings, labels)
    return head.drop_sub_centers(angle=math.radians(DEGREES))


def section(runs: Runs, seeds: int) -> str:
    """Writes the introduction and tables of this part."""
    of = {name: runs.found(plan(runs, name, seed) for seed in range(seeds)) for name in LOSSES}
    losses, compared = [], []
    for name, records in of.items():
        losses += row(name, list(map(metrics, records.values())))
    for name in LOSSES[1:]:
        compared += row(f"{name}, minus {PLAIN}", differences(of[name], of[PLAIN]))
    introduction = INTRODUCTION.format(
        share=SHARE, steps=runs.steps // 2, threshold=THRESHOLD, sub_centers=SUB_CENTERS,
        degrees=DEGREES, cleaned=CLEANED, right=RIGHT,
    )  # fmt: skip
    tables = [table("loss", losses), table("difference, seed by seed", compared)]
    return "\n".join([introduction, *tables, removed(of[CLEANED], len(runs.split.labels))])


def removed(records: dict[int, dict], images: int) -> str:
    """Writes how many images the cleaning removed in the run of each seed."""
    wrong = round(SHARE * images)
    lines = [
        f"| removed, seed | wrong labels of {wrong:,} | right labels of {images - wrong:,} |",
        "| --- | ---: | ---: |",
    ]
    for seed, record in records.items():
        lines.append(f"| {seed} | {record['wrong_removed']:,} | {record['right_removed']:,} |")
    return "\n".join(lines) + "\n"
