# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains an embedding with the fused ArcFace head and verifies it as face recognition does.

Identities are Han characters, their photographs are typefaces. The network learns from 4,355
characters in four printed faces and is judged on 2,000 characters that it never saw, in two
handwritten designs that it never saw: do these two images show the same character?

    python examples/demo.py                  # some minutes on two cores
    python examples/demo.py --head torch     # the same training with the head in plain PyTorch
    python examples/demo.py --steps 60       # a quick look
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import measure
import model
import plots
from marginkernels import ArcFace, MarginSoftmaxHead, backend_report, backends
from marginkernels.testing import plain_margin_cross_entropy

MARGIN = 0.2  # radians
SCALE = 32.0
BATCH_SIZE = 256
# the class weights turn fast enough only with a larger step than the backbone can take
BACKBONE_RATE, HEAD_RATE = 0.01, 0.1
MAX_GRADIENT_NORM = 5.0
WARM_UP = 100  # steps, at most a tenth of all
CHECKPOINTS = 10


class Trained(NamedTuple):
    """The network, the head with the class weights, and the pictures' and table's material."""

    backbone: nn.Module
    head: MarginSoftmaxHead
    results: plots.Results
    seconds: float  # of the steps, without the evaluations


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", choices=measure.HEADS, default="fused", help="trained with")
    parser.add_argument("--backend", choices=("auto", *backend_report()), default="auto",
                        help="of the fused head")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--steps", type=int, help="instead of --epochs: that many batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out",
                        help="folder for the pictures")  # fmt: skip
    return parser.parse_args()


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates: a short linear warm-up, then half a cosine down to 0."""
    warm_up = min(WARM_UP, steps // 10)
    return min(1, (step + 1) / (warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(args: argparse.Namespace, split: data.Split, pairs: evaluate.Pairs) -> Trained:
    torch.manual_seed(args.seed)
    backbone = model.backbone().to(memory_format=torch.channels_last)
    head = MarginSoftmaxHead(
        model.EMBEDDING_SIZE,
        split.num_classes,
        margin=ArcFace(MARGIN),
        scale=SCALE,
        backend=args.backend,
    )
    optimizer = torch.optim.SGD(
        [
            {"params": backbone.parameters(), "lr": BACKBONE_RATE},
            {"params": head.parameters(), "lr": HEAD_RATE},
        ],
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-3,
    )
    steps = args.steps or args.epochs * (len(split.labels) // BATCH_SIZE)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))

    before = judge(backbone, split, pairs)
    history = plots.History([], [0], [before[0].accuracy])
    batches = data.batches(
        split.images, split.labels, BATCH_SIZE, steps, torch.Generator().manual_seed(args.seed)
    )
    started = time.perf_counter()
    paused = 0.0
    bar = tqdm(batches, total=steps, unit="step", desc="training", mininterval=0.5)
    for step, (images, labels) in enumerate(bar, start=1):
        embeddings = model.run(backbone, images)
        if args.head == "fused":
            loss = head(embeddings, labels)
        else:
            loss = plain_margin_cross_entropy(
                embeddings, head.weight, labels, margin=head.margin, scale=SCALE
            )
        optimizer.zero_grad()
        loss.backward()
        for each in (backbone, head):
            nn.utils.clip_grad_norm_(each.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        rates.step()
        history.losses.append(loss.item())
        if step * CHECKPOINTS % steps < CHECKPOINTS:  # evenly spaced, the last step included
            pause = time.perf_counter()
            history.checkpoints.append(step)
            history.accuracies.append(evaluate.ten_fold(*embed(backbone, split), pairs).accuracy)
            paused += time.perf_counter() - pause
        bar.set_postfix_str(
            f"loss {history.losses[-1]:.2f}, accuracy {100 * history.accuracies[-1]:.1f} %", False
        )
    seconds = time.perf_counter() - started - paused
    results = plots.Results(history, before, judge(backbone, split, pairs))
    return Trained(backbone, head, results, seconds)


def embed(backbone: nn.Module, split: data.Split) -> tuple[Tensor, Tensor]:
    """Embeddings of the gallery and of the probe images."""
    return evaluate.embed(backbone, split.gallery), evaluate.embed(backbone, split.probe)


def judge(
    backbone: nn.Module, split: data.Split, pairs: evaluate.Pairs
) -> tuple[evaluate.TenFold, evaluate.AllPairs]:
    gallery, probe = embed(backbone, split)
    return evaluate.ten_fold(gallery, probe, pairs), evaluate.all_pairs(gallery, probe)


def head_operands(trained: Trained, split: data.Split) -> measure.Operands:
    """One more training batch, embedded, and the trained class weights."""
    images, labels = next(
        data.batches(split.images, split.labels, BATCH_SIZE, 1, torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        embeddings = model.run(trained.backbone, images)
    weight = trained.head.weight.detach()
    return measure.Operands(embeddings, weight, labels, MARGIN, SCALE, trained.head.backend)


def print_table(args: argparse.Namespace, trained: Trained, operands: measure.Operands) -> None:
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
