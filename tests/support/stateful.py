# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes heads of every loss that remembers something, with settings that show it at once."""

from typing import Any

import torch
from torch import Tensor

from marginkernels import (
    AdaCos,
    AdaFace,
    ASoftmax,
    CurricularFace,
    ElasticFace,
    InterClassFilter,
    LSoftmax,
    MarginSoftmaxHead,
    NSoftmax,
)
from tests.support.losses import C, operands


def annealed() -> LSoftmax:
    """Returns an L-Softmax whose lambda falls from 50 to 33 and 25."""
    return LSoftmax(3, base=100.0, gamma=1.0, power=1.0)


# settings of a fresh head
STATEFUL = {
    "L-Softmax": lambda: dict(margin=annealed(), scale=1.0, normalize="none"),
    "A-Softmax": lambda: dict(margin=ASoftmax(4), scale=1.0, normalize="weight"),
    "filtered": lambda: dict(margin=InterClassFilter(annealed(), 0.3), scale=16.0),
    "AdaFace": lambda: dict(margin=AdaFace(t_alpha=0.3), scale=16.0),
    "CurricularFace": lambda: dict(margin=CurricularFace(alpha=0.3), scale=16.0),
    "ElasticFace": lambda: dict(margin=ElasticFace(std=0.1, seed=3), scale=16.0),
    "ElasticFace+": lambda: dict(margin=ElasticFace(std=0.1, plus=True, seed=3), scale=16.0),
    "AdaCos": lambda: dict(margin=NSoftmax(), scale=AdaCos(C)),
    "AdaCos delayed": lambda: dict(margin=NSoftmax(), scale=AdaCos(C, delayed=True)),
}


def head_of(settings: dict[str, Any]) -> MarginSoftmaxHead:
    """Returns a head with the same weights at each call."""
    torch.manual_seed(1)
    return MarginSoftmaxHead(8, C, **dict(dict(backend="reference"), **settings))


def state_of(head: MarginSoftmaxHead) -> dict[str, Tensor]:
    """Returns copies of what the head remembers."""
    return {k: v.clone() for k, v in head.state_dict().items() if k != "weight"}


def batches() -> list[tuple[Tensor, Tensor]]:
    """Returns four batches of features and labels."""
    return [operands(dtype=torch.float32, seed=seed)[::2] for seed in range(4)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compares two results of :func:`state_of`."""
    return all(torch.equal(a[k], b[k]) for k in a)
