# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists who competes in the whole step: heads with the optimizer of their weights."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from marginkernels import ArcFace, MarginSoftmaxHead, PartialFC
from marginkernels.optim import SGD

from .contenders import MARGIN, SCALE, plain, sample, sampled

RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
SAMPLE_RATE = 0.1
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}

HeadLoss = Callable[[Tensor, Tensor], Tensor]  # of x and y
PlainLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of x, w and y


class Updater(Protocol):
    """Names what a step needs of an optimizer."""

    def step(self) -> object:
        """Updates the weights."""

    def zero_grad(self) -> None:
        """Lets the gradients go."""


class Training(NamedTuple):
    """Holds a head in training."""

    loss: HeadLoss
    optimizer: Updater
    weight: Tensor


class Trainer(NamedTuple):
    """Names a head with an optimizer that is measured."""

    name: str
    compute: str  # "fp32" or "bf16"
    kind: str  # trainers of one kind differ in types only
    start: Callable[[Tensor], Training]  # with the weights (C, D) in fp32, which it may keep


def trainers(backend: str, only: list[str] | None = None) -> list[Trainer]:
    """Lists all trainers, or only those whose name contains one of ``only``."""
    everyone = [
        *_library(backend),
        *_in_both_types("eager", functools.partial(_plain, plain)),
        *_in_both_types("torch.compile", functools.partial(_plain, torch.compile(plain))),
        *_in_both_types("sampled", functools.partial(_plain, sampled), "eager on 10 %"),
        *_in_both_types("activated", ActivatedRows.start, "PartialFC on 10 %"),
        *_in_both_types("metric learning", _metric_learning, "pytorch-metric-learning"),
    ]
    return [t for t in everyone if not only or any(part in t.name for part in only)]


def _library(backend: str) -> list[Trainer]:
    full, half = torch.float32, torch.bfloat16
    found = []
    for compute in COMPUTE:
        head = functools.partial(_head, backend, COMPUTE[compute])
        fused = functools.partial(head, update=_fused)
        name = f"marginkernels {compute}"
        settings = {
            "fused": functools.partial(fused, dtype=full, state_dtype=full),
            "fused, bf16 momentum": functools.partial(fused, dtype=full, state_dtype=half),
            "fused, bf16 weights": functools.partial(fused, dtype=half, state_dtype=half),
            "SGD": functools.partial(head, dtype=full, update=_unfused),
            "SGD, bf16 weights": functools.partial(head, dtype=half, update=_unfused),
            "no update": functools.partial(head, dtype=full, update=NoUpdate),
            "fused on 10 %": functools.partial(
                fused, dtype=full, state_dtype=full, sample_rate=SAMPLE_RATE
            ),
            "SGD on 10 %": functools.partial(
                head, dtype=full, update=_unfused, sample_rate=SAMPLE_RATE
            ),
        }
        # bf16 weights are for bf16 arithmetic
        found += [
            Trainer(f"{name}, {label}", compute, label, start)
            for label, start in settings.items()
            if compute == "bf16" or "bf16 weights" not in label
        ]
    return found


def _head(
    backend: str,
    compute_dtype: torch.dtype,
    w: Tensor,
    *,
    dtype: torch.dtype,
    update: Callable[..., Updater],
    sample_rate: float = 1.0,
    **settings: torch.dtype,
) -> Training:
    """Starts this library's head with the update of its weights."""
    c, d = w.shape
    head = MarginSoftmaxHead(
        d, c, margin=ArcFace(MARGIN), scale=SCALE, compute_dtype=compute_dtype, backend=backend,
        sampling=PartialFC(sample_rate) if sample_rate < 1 else None, device="meta",
    )  # fmt: skip
    head.weight = nn.Parameter(w.to(dtype))
    return Training(head, update(head, **settings), head.weight)


def _fused(head: MarginSoftmaxHead, state_dtype: torch.dtype) -> Updater:
    return SGD(head, lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, state_dtype=state_dtype)


def _unfused(head: MarginSoftmaxHead) -> Updater:
    return _sgd(head.weight)


def _sgd(*weights: Tensor) -> torch.optim.SGD:
    """Returns PyTorch's own, in its fastest form."""
    return torch.optim.SGD(
        weights, lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )


class NoUpdate:
    """Lets the gradient go and moves nothing: forward and backward alone."""

    def __init__(self, head: MarginSoftmaxHead):
        self.head = head

    def step(self) -> None:
        """Does nothing."""

    def zero_grad(self) -> None:
        """Lets the gradient go."""
        self.head.weight.grad = None


def _in_both_types(
    kind: str, start: Callable[[Tensor], Training], label: str = ""
) -> list[Trainer]:
    """Returns a trainer in fp32, and the same with its loss under autocast."""

    def under_autocast(w: Tensor) -> Training:
        training = start(w)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return training.loss(x, y)

        return training._replace(loss=loss)

    label = label or kind
    return [
        Trainer(f"{label} fp32", "fp32", kind, start),
        Trainer(f"{label} autocast", "bf16", kind, under_autocast),
    ]


def _plain(loss: PlainLoss, w: Tensor) -> Training:
    weight = nn.Parameter(w)
    return Training(lambda x, y: loss(x, weight, y), _sgd(weight), weight)


class ActivatedRows:
    """Trains 10 % of the classes in each step, and leaves the others as they are.

    So does the first PartialFC (An et al., "Partial FC: Training 10 Million Identities on a Single
    Machine", 2021): it copies the rows of the classes and of their momentum out, updates the
    copies, and writes them back. No gradient has the size of the weights.
    """

    def __init__(self, w: Tensor):
        self.weight, self.momentum = w, torch.zeros_like(w)

    @classmethod
    def start(cls, w: Tensor) -> Training:
        """Starts it."""
        self = cls(w)
        return Training(self.loss, self, w)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss on a new sample."""
        self.chosen, label = sample(len(self.weight), y)
        self.rows = nn.Parameter(self.weight[self.chosen])
        self.optimizer = _sgd(self.rows)
        self.optimizer.state[self.rows]["momentum_buffer"] = self.momentum[self.chosen]
        return plain(x, self.rows, label)

    def step(self) -> None:
        """Updates the sample, and writes it back."""
        self.optimizer.step()
        self.weight[self.chosen] = self.rows.detach()
        self.momentum[self.chosen] = self.optimizer.state[self.rows]["momentum_buffer"]

    def zero_grad(self) -> None:
        """Lets the sample go."""
        del self.rows, self.optimizer


def _metric_learning(w: Tensor) -> Training:
    """Starts the head of pytorch-metric-learning, which keeps its weights as (D, C)."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    c, d = w.shape
    head = ArcFaceLoss(
        c, d, margin=math.degrees(MARGIN), scale=SCALE, weight_init_func=lambda empty: empty
    )
    head.W = nn.Parameter(w.t().contiguous())
    return Training(head, _sgd(head.W), head.W)
