# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains an embedding with the fused ArcFace head and verifies it as face recognition does.

Identities are Han characters, their photographs are typefaces. The network learns from 4,355
characters in four printed faces. It is judged on 2,000 unseen characters in two unseen handwritten
designs: do these two images show the same character?

    python examples/demo.py                  # some minutes on two cores
    python examples/demo.py --head torch     # the same training with the head in plain PyTorch
    python examples/demo.py --steps 60       # a quick look
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import data
import evaluate
import measure
import model
import plots
import training
from heads import HEADS
from marginkernels import ArcFace, MarginSoftmaxHead, backend_report, backends

MARGIN = 0.2  # radians
SCALE = 32.0
BATCH_SIZE = 256
CHECKPOINTS = 10


class Trained(NamedTuple):
    """Holds a trained network and head, and what pictures and table show of them."""

    backbone: nn.Module
    head: MarginSoftmaxHead
    results: plots.Results
    seconds: float  # of the steps, without the evaluations


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", choices=HEADS, default="fused", help="trained with")
    parser.add_argument("--backend", choices=("auto", *backend_report()), default="auto",
                        help="of the fused head")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--steps", type=int, help="instead of --epochs: that many batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out",
                        help="folder for the pictures")  # fmt: skip
    return parser.parse_args()


def train(args: argparse.Namespace, split: data.Split, pairs: evaluate.Pairs) -> Trained:
    """Trains network and head, and judges the network before, during and after."""
    torch.manual_seed(args.seed)
    backbone = model.backbone()
    head = HEADS[args.head](
        model.EMBEDDING_SIZE,
        split.num_classes,
        margin=ArcFace(MARGIN),
        scale=SCALE,
        backend=args.backend,
    )
    steps = args.steps or args.epochs * (len(split.labels) // BATCH_SIZE)
    before = evaluate.judge(backbone, split, pairs)
    history = plots.History([], [0], [before[0].accuracy])
    batches = data.batches(
        split.images, split.labels, BATCH_SIZE, steps, torch.Generator().manual_seed(args.seed)
    )
    started = time.perf_counter()
    paused = 0.0
    losses = training.train(backbone, head, batches, steps)
    bar = tqdm(losses, total=steps, unit="step", desc="training", mininterval=0.5)
    for step, loss in enumerate(bar, start=1):
        history.losses.append(loss)
        if step * CHECKPOINTS % steps < CHECKPOINTS:  # evenly spaced, the last step included
            pause = time.perf_counter()
            history.checkpoints.append(step)
            embeddings = evaluate.embed_both(backbone, split)
            history.accuracies.append(evaluate.ten_fold(*embeddings, pairs).accuracy)
            paused += time.perf_counter() - pause
        bar.set_postfix_str(
            f"loss {history.losses[-1]:.2f}, accuracy {100 * history.accuracies[-1]:.1f} %", False
        )
    seconds = time.perf_counter() - started - paused
    results = plots.Results(history, before, evaluate.judge(backbone, split, pairs))
    return Trained(backbone, head, results, seconds)


def head_operands(trained: Trained, split: data.Split) -> measure.Operands:
    """Embeds one more training batch, for a step of the trained head."""
    images, labels = next(
        data.batches(split.images, split.labels, BATCH_SIZE, 1, torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        embeddings = model.run(trained.backbone, images)
    weight, backend = trained.head.weight.detach(), trained.head.settings.backend
    return measure.Operands(embeddings, weight, labels, MARGIN, SCALE, backend)


def print_table(args: argparse.Namespace, trained: Trained, operands: measure.Operands) -> None:
    """Prints what training has reached, and time and memory of both heads."""
    milliseconds, mebibytes = measure.milliseconds(operands), measure.peak_mib(operands)
    (ten_fold_0, all_0), (ten_fold, all_pairs) = trained.results.before, trained.results.after
    (n, d), c = operands.x.shape, len(operands.w)
    steps = len(trained.results.history.losses)
    backend = backends.select(args.backend, "cpu", torch.float32)
    fused, plain = f"fused ({backend})", "plain PyTorch"
    print(f"""
Trained {steps} steps in {trained.seconds:.0f} s with the {args.head} head.

Verification, 2,000 unseen characters  {"untrained":>17} {"trained":>14}
  10-fold accuracy, 6,000 pairs        {ten_fold_0.accuracy:17.1%} {ten_fold.accuracy:14.1%}
    standard deviation over the folds  {ten_fold_0.deviation:17.1%} {ten_fold.deviation:14.1%}
  AUC                                  {all_0.auc:17.4f} {all_pairs.auc:14.4f}
  TAR at FAR 1e-3                      {all_0.tar:17.3f} {all_pairs.tar:14.3f}
  rank-1 identification                {all_0.rank1:17.1%} {all_pairs.rank1:14.1%}

The head alone, N={n} C={c} D={d}    {fused:>17} {plain:>14}
  forward + backward, ms               {milliseconds["fused"]:17.1f} {milliseconds["torch"]:14.1f}
  peak memory beyond x, w, dx, dw, MiB {mebibytes["fused"]:17.1f} {mebibytes["torch"]:14.1f}
""")


def main() -> None:
    args = arguments()
    characters, faces, images = data.load()
    split = data.split(faces, images)
    pairs = evaluate.draw_pairs(split)
    print(
        f"{len(characters)} characters in {len(faces)} faces. Training: {split.num_classes} "
        f"characters, {len(split.images)} images, {' and '.join(data.TRAIN_DESIGNS)}. "
        f"Verification: {split.gallery.shape[1]} others, {data.GALLERY_DESIGN} against "
        f"{data.PROBE_DESIGN}."
    )
    trained = train(args, split, pairs)
    print_table(args, trained, head_operands(trained, split))
    for path in plots.write(args.out, split, pairs, trained.results):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
