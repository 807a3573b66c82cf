# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with a project's own head and with ours, and compares loss curves, times and memory.

Each script of this folder has a function ``train(ours, run)`` and calls :func:`main` with it::

    python examples/trainers/metric_learning.py                      # both heads, some seconds each
    python examples/trainers/metric_learning.py --head ours --steps 400
    python examples/trainers/metric_learning.py --classes 100000     # time and memory at that size
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import TensorDataset

EXAMPLES = Path(__file__).parents[1]
sys.path.append(str(EXAMPLES))

import data  # noqa: E402
import measure  # noqa: E402
import model  # noqa: E402

RECORDS = EXAMPLES.parent / "docs" / "trainers.jsonl"
EMBEDDING_SIZE = model.EMBEDDING_SIZE
HEADS = ("original", "ours")
WARM_UP = 2  # steps that the median time leaves out


class Run:
    """Hands out the data of a run, and takes the losses.

    ``classes`` is the number of classes that the head has to have: those of the data, or more to
    measure a larger head.
    """

    def __init__(self, steps: int, batch_size: int, classes: int | None, seed: int):
        torch.manual_seed(seed)
        self.steps, self.batch_size = steps, batch_size
        _, faces, images = data.load()
        split = data.split(faces, images)
        self.classes = max(classes or 0, split.num_classes)
        self._split, self._generator = split, torch.Generator().manual_seed(seed)
        self._losses: list[torch.Tensor] = []
        self._times: list[float] = []
        self._before = 0

    def backbone(self) -> nn.Module:
        """Builds the network of the demo, which gives embeddings (N, 128) in fp32."""
        return model.backbone()

    def examples(self) -> TensorDataset:
        """Returns the augmented images and labels of all steps in order, one epoch of a loader.

        Call it once, after the imports and before the networks are made. Memory counts from here.
        """
        batches = data.batches(
            self._split.images, self._split.labels, self.batch_size, self.steps, self._generator
        )
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self._before = measure.resident_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        return TensorDataset(inputs, labels)

    def log(self, loss: torch.Tensor | float) -> None:
        """Takes the loss of a step that has ended."""
        self._losses.append(torch.as_tensor(loss).detach().float())
        self._times.append(time.perf_counter())

    def record(self) -> "Record":
        """Returns losses, the median time of a step and the peak of memory."""
        times = [b - a for a, b in zip(self._times[:-1], self._times[1:], strict=True)]
        return Record(
            [loss.item() for loss in self._losses],
            1e3 * statistics.median(times[WARM_UP:] or times),
            (measure.resident_kib("VmHWM") - self._before) / 1024,
        )


class Record(NamedTuple):
    """Holds what a run has shown."""

    losses: list[float]
    milliseconds: float  # median of the steps
    mib: float  # peak of memory beyond the data


Train = Callable[[bool, Run], None]


def main(train: Train) -> None:
    """Runs ``train`` as the command line says, prints a comparison, and records it if asked to.

    Where a package is missing it says so and does nothing.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--head", choices=(*HEADS, "both"), default="both")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--classes", type=int, help="of the head; the data has 4,355")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"in docs/{RECORDS.name}")
    given = parser.parse_args()
    heads = HEADS if given.head == "both" else (given.head,)
    settings = (given.steps, given.batch_size, given.classes, given.seed)
    script = Path(sys.argv[0]).resolve()
    try:
        records = {head: _in_child(script, head, settings) for head in heads}
    except ModuleNotFoundError as error:  # `make trainers` goes on with the others
        print(f"{script.stem}: left out, {error}")
        return
    for head, (losses, milliseconds, mib) in records.items():
        print(
            f"{head:8}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps of "
            f"{milliseconds:.0f} ms, {mib:.0f} MiB beyond the data"
        )
    if given.head == "both":
        print(f"mean relative difference of the losses: {difference(records):.1e}")
    if given.record:
        _record(script.stem, given, records)


def difference(records: dict[str, Record]) -> float:
    """Returns the mean relative difference of two loss curves.

    A network in training doubles differences of rounding every few steps, while the curves stay
    together.
    """
    pairs = zip(records["original"].losses, records["ours"].losses, strict=True)
    return statistics.mean(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)


def _in_child(script: Path, head: str, settings: tuple[Any, ...]) -> Record:
    """Runs one head in a process of its own, whose freed memory goes back to the system."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 << 10)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_train, script, head, settings).result()


def _train(script: Path, head: str, settings: tuple[Any, ...]) -> Record:
    import runpy

    run = Run(*settings)
    runpy.run_path(str(script))["train"](head == "ours", run)
    return run.record()


def _record(name: str, given: argparse.Namespace, records: dict[str, Record]) -> None:
    """Writes a line in place of an earlier one of the same trainer and number of classes."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    kept = {(r["trainer"], r["classes"]): r for r in map(json.loads, lines)}
    kept[name, given.classes] = {
        "trainer": name, "classes": given.classes, "steps": given.steps,
        "batch_size": given.batch_size, "difference": difference(records),
        **{
            head: {"loss": r.losses[-1], "milliseconds": r.milliseconds, "mib": r.mib}
            for head, r in records.items()
        },
    }  # fmt: skip
    RECORDS.write_text("".join(f"{json.dumps(r)}\n" for _, r in sorted(kept.items(), key=str)))


if __name__ == "__main__":
    sys.exit(__doc__)
