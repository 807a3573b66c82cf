# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes a head of a few classes, and batches for it, for tests where numbers do not matter."""

from typing import Any

import torch
from torch import Tensor

from marginkernels import ArcFace, MarginSoftmaxHead

N, C, D = 12, 50, 8


def make_head(backend: str, device: str, **settings: Any) -> MarginSoftmaxHead:
    """Returns a head; ``settings`` replace those of an ArcFace."""
    settings = dict(dict(margin=ArcFace(0.3), scale=16.0), **settings)
    return MarginSoftmaxHead(D, C, backend=backend, device=device, **settings)


def batch(device: str, n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns features (n, D) and labels (n,)."""
    return torch.randn(n, D, device=device, dtype=dtype), torch.randint(0, C, (n,), device=device)
