# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes small heads whose optimizer moves the weights in backward, and takes steps with them."""

from typing import Any

import torch
from torch import Tensor

from marginkernels import MarginSoftmaxHead
from marginkernels.optim import SGD, HeadOptimizer
from tests.support.small import batch, make_head


def attached(
    backend: str = "reference", bias: bool = False, **settings: Any
) -> tuple[MarginSoftmaxHead, SGD]:
    """Returns a head and its optimizer."""
    head = make_head(backend, "cpu", bias=bias)
    return head, SGD(head, **(dict(lr=0.1, momentum=0.9) | settings))


def all_of(head: MarginSoftmaxHead, optimizer: HeadOptimizer) -> list[Tensor]:
    """Returns copies of all that a step moves."""
    states = [t for p in optimizer.param_groups[0]["params"] for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*head.parameters(), *states)]


def take_step(head: MarginSoftmaxHead, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """Takes a step on a batch that the seed draws."""
    torch.manual_seed(seed)
    x, y = batch("cpu")
    head(x, y).backward()
    optimizer.step()
