# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The head with its classes split over processes equals the head that has them all."""

import itertools

import pytest
import torch
import torch.distributed as dist

import workers
from marginkernels import ArcFace, ClassShard, margin_cross_entropy

F64 = torch.float64


def parts(n, world, uneven=True):
    """First row and end of each rank's rows of n; the last rank has none, where uneven."""
    if not uneven:
        return [(n * r // world, n * (r + 1) // world) for r in range(world)]
    cuts = [n * r // (world - 1) + (r % 2) for r in range(world - 1)] + [n, n]
    cuts[0] = 0
    return list(itertools.pairwise(cuts))


def sharded_call(c, dtype, backend):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x, w, y = torch.randn(12, 8), torch.randn(c, 8), torch.randint(0, c, (12,))
    shard = ClassShard.chunked(c, dist.group.WORLD, grad_scale="exact")
    a, b = parts(12, world)[rank]
    own_x = x[a:b].to(dtype).requires_grad_()
    own_w = w[shard.start : shard.stop].to(dtype).requires_grad_()
    loss = margin_cross_entropy(
        own_x, own_w, y[a:b], margin=ArcFace(0.3), scale=16.0, shard=shard, backend=backend
    )
    loss.backward()
    full_x, full_w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    expected = margin_cross_entropy(
        full_x, full_w, y, margin=ArcFace(0.3), scale=16.0, backend=backend
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own_x.grad, full_x.grad[a:b])
    torch.testing.assert_close(own_w.grad, full_w.grad[shard.start : shard.stop])


@pytest.mark.parametrize("world", [2, 3])
def test_first(world):
    for c in (2, 7, 50):
        workers.run(world, sharded_call, c, F64, "reference")
