# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists who competes: this library's head and what people run today, as functions to the loss."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from marginkernels import ArcFace, margin_cross_entropy
from marginkernels.testing import plain_margin_cross_entropy

SCALE, MARGIN = 64.0, 0.5
Operands = tuple[Tensor, Tensor, Tensor]  # x, w, y
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Holds N rows, C classes and D numbers per embedding."""

    n: int
    c: int
    d: int


class Contender(NamedTuple):
    """Names a head that is measured."""

    name: str
    compute: str  # "fp32" or "bf16", which says what peak of the machine bounds it
    loss: Loss
    kind: str  # contenders of one kind differ in the compute type or in saving tiles only


class Work(NamedTuple):
    """Counts what a step has to do."""

    flops: int
    bytes: int


def work(contender: Contender, shape: Shape) -> Work:
    """Counts the FLOPs and bytes that one step, forward and backward, cannot do without.

    FLOPs are 6NCD: 2NCD each for the logits x w^T, dx = G w and dw = G^T x. Logits that are
    computed a second time in backward are not counted, nor is anything linear in NC. So every
    contender has the same numerator, and one that recomputes can reach 75 % of a peak at most.

    Bytes: forward and backward read w once each, backward writes dw, all fp32. x and dx are counted
    in the same way. Logits are not counted: they need not exist.

    The head that samples its classes is charged for the classes it works on, and for a dense dw.
    """
    n, c, d = shape
    computed = sampled_classes(n, c) if contender.kind == "sampled" else c
    return Work(6 * n * computed * d, 4 * d * (2 * computed + c + 3 * n))


def problem(shape: Shape, device: str) -> Operands:
    """Draws x (N, D), w (C, D), labels (N,): fp32 leaves with the statistics of a new head."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(shape.n, shape.d, device=device).normal_(generator=generator)
    w = torch.empty(shape.c, shape.d, device=device).normal_(std=0.01, generator=generator)
    y = torch.randint(shape.c, (shape.n,), device=device, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), y


def contenders(backend: str, only: list[str] | None = None) -> list[Contender]:
    """Lists all contenders, or only those whose name contains one of ``only``."""
    everyone = [
        *_library(backend),
        *_in_both_types("eager", plain),
        *_in_both_types("torch.compile", plain, torch.compile),
        *_in_both_types("linear_cross_entropy", chunked_n_softmax),
        *_in_both_types("sampled", sampled, label="eager on 10 %"),
    ]
    return [c for c in everyone if not only or any(part in c.name for part in only)]


def _library(backend: str) -> list[Contender]:
    return [
        Contender(
            f"marginkernels {compute}, {'tiles saved' if save_tiles else 'recompute'}",
            compute,
            functools.partial(
                margin_cross_entropy,
                margin=ArcFace(MARGIN),
                scale=SCALE,
                compute_dtype=dtype,
                save_tiles=save_tiles,
                backend=backend,
            ),
            "marginkernels",
        )
        for compute, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for save_tiles in (True, False)
    ]


def _in_both_types(
    kind: str, loss: Loss, prepare: Callable[[Loss], Loss] = lambda loss: loss, label: str = ""
) -> list[Contender]:
    def autocast(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return loss(x, w, y)

    label = label or kind
    return [
        Contender(f"{label} fp32", "fp32", prepare(loss), kind),
        Contender(f"{label} autocast", "bf16", prepare(autocast), kind),
    ]


def plain(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Computes the loss as trainers write it today."""
    return plain_margin_cross_entropy(x, w, y, margin=ArcFace(MARGIN), scale=SCALE)


def chunked_n_softmax(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Computes PyTorch's own loss without the whole logits; it knows no margin."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    unit_x, unit_w = SCALE * F.normalize(x), F.normalize(w)
    if torch.is_autocast_enabled(x.device.type):
        # the chunked op does not take part in autocast
        unit_x, unit_w = unit_x.bfloat16(), unit_w.bfloat16()
    # chunks of 128 rows: the automatic choice is several times slower at many classes on a CPU
    chunks = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=128, chunking_method=None, acc_policy="balanced"
    )
    return F.linear_cross_entropy(unit_x, unit_w, y, options=chunks)


def sampled_classes(n: int, c: int) -> int:
    """Returns how many classes the sampling head works on."""
    return min(c, max(c // 10, n))


def sampled(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Computes the plain loss on the batch's classes and random others, 10 % of all together.

    PartialFC_V2 does the same (An et al., "Killing Two Birds with One Stone", CVPR 2022): it
    gathers the rows of w, and scatters their gradient into a dense dw.
    """
    chosen, label = sample(len(w), y)
    return plain(x, w.index_select(0, chosen), label)


def sample(classes: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Draws the batch's classes and random others; returns them and the labels among them."""
    priority = torch.rand(classes, device=y.device)
    priority[y] = 2.0
    chosen = priority.topk(sampled_classes(len(y), classes)).indices.sort().values
    return chosen, torch.searchsorted(chosen, y)
