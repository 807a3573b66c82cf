# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the cosines of a small layer as a plain tensor, the judge of lazy ones."""

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from marginkernels import ArcFace

N, C, D = 9, 13, 6
LOSS = dict(margin=ArcFace(0.2), scale=30.0)


def operands(k=1, n=N, c=C):
    torch.manual_seed(0)
    x, w = torch.randn(n, D, dtype=torch.float64), torch.randn(c * k, D, dtype=torch.float64)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(c, (n,))


def dense(x, w, k=1):
    return F.linear(F.normalize(x), F.normalize(w)).unflatten(1, (-1, k)).max(2).values


def same(lazy, exact):
    for a, b in zip(tree_leaves(lazy), tree_leaves(exact), strict=True):
        assert type(a) is torch.Tensor and a.dtype == b.dtype
        torch.testing.assert_close(a, b)
