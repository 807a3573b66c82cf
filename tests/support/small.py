# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes a head of a few classes, and batches for it, for tests where numbers do not matter."""

import torch

from marginkernels import ArcFace, MarginSoftmaxHead

N, C, D = 12, 50, 8


def make_head(backend, device, **settings):
    """Returns a head; ``settings`` replace those of an ArcFace."""
    settings = dict(dict(margin=ArcFace(0.3), scale=16.0), **settings)
    return MarginSoftmaxHead(D, C, backend=backend, device=device, **settings)


def batch(device, n=N, dtype=torch.float32):
    """Returns features (n, D) and labels (n,)."""
    return torch.randn(n, D, device=device, dtype=dtype), torch.randint(0, C, (n,), device=device)
