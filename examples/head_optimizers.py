# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains the demo with the class weights updated inside backward, and compares where it ends.

    python examples/head_optimizers.py                         # three seeds
    python examples/head_optimizers.py --steps 40 --seeds 1    # a quick look

Prints a table: mean and standard deviation over the seeds, in percent.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import data
import evaluate
import model
import training
from marginkernels import ArcFace, MarginSoftmaxHead, backend_report
from marginkernels.optim import SGD, RowwiseAdagrad
from runs import spread

BATCH_SIZE = 256
Optimizer = Callable[[MarginSoftmaxHead], torch.optim.Optimizer]

# type of the weights, and the optimizer
FP32, BF16 = torch.float32, torch.bfloat16
SGD_SETTINGS: dict[str, Any] = dict(lr=training.CRITERION_RATE, **training.SETTINGS)
ADAGRAD_SETTINGS: dict[str, Any] = dict(lr=2e-2)
CHOICES: dict[str, tuple[torch.dtype, Optimizer]] = {
    "torch.optim.SGD, fp32": (
        FP32, lambda head: torch.optim.SGD(head.parameters(), **SGD_SETTINGS)),
    "SGD, fp32": (FP32, lambda head: SGD(head, **SGD_SETTINGS)),
    "SGD, bf16 weights and momentum": (BF16, lambda head: SGD(head, **SGD_SETTINGS)),
    "RowwiseAdagrad, bf16 weights": (BF16, lambda head: RowwiseAdagrad(head, **ADAGRAD_SETTINGS)),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=340, help="batches per run; 68 are an epoch")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=CHOICES, metavar="CHOICE",
                        help=f"optimizers: {', '.join(map(repr, CHOICES))}")  # fmt: skip
    parser.add_argument("--backend", choices=("auto", *backend_report()), default="auto",
                        help="of the head")  # fmt: skip
    return parser.parse_args()


def run(choice: str, seed: int, args: argparse.Namespace, split: data.Split) -> list[float]:
    """Trains once; returns the loss of the last tenth, accuracy, TAR and rank-1."""
    dtype, optimizer = CHOICES[choice]
    torch.manual_seed(seed)
    backbone = model.backbone()
    head = MarginSoftmaxHead(
        model.EMBEDDING_SIZE, split.num_classes, margin=ArcFace(0.2), scale=32.0,
        backend=args.backend, dtype=dtype,
    )  # fmt: skip
    batches = data.batches(
        split.images, split.labels, BATCH_SIZE, args.steps, torch.Generator().manual_seed(seed)
    )
    losses = training.train(
        backbone, head, batches, args.steps, criterion_optimizer=optimizer(head)
    )
    seen = list(tqdm(losses, total=args.steps, desc=f"{choice}, seed {seed}", mininterval=5))
    last = seen[-max(1, args.steps // 10) :]
    ten_fold, all_pairs = evaluate.judge(backbone, split, evaluate.draw_pairs(split))
    return [sum(last) / len(last), ten_fold.accuracy, all_pairs.tar, all_pairs.rank1]


def main() -> None:
    args = arguments()
    _, faces, images = data.load()
    split = data.split(faces, images)
    runs: dict[str, list[list[float]]] = {choice: [] for choice in args.only}
    for seed in range(args.seeds):
        for choice in args.only:
            runs[choice].append(run(choice, seed, args, split))
            print(f"{choice}, seed {seed}: {runs[choice][-1]}", flush=True)
    print("| class weights moved by | last loss | 10-fold accuracy | TAR at FAR 1e-3 | rank-1 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for choice, results in runs.items():
        loss, *metrics = zip(*results, strict=True)
        cells = [choice, f"{sum(loss) / len(loss):.3f}", *map(spread, metrics)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
