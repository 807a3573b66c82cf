# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the triplet loss with loops over all triplets."""

import pytest
import torch

from marginkernels import TripletLoss


def batch(n=37, classes=9, dtype=torch.float64):
    x = torch.randn(n, 6, dtype=dtype)
    return x, torch.randint(0, classes, (n,))


def by_loops(
    x, y, margin, mining, ignore_index=-100, squared=True, normalize=True, mean_over="all"
):
    unit = torch.nn.functional.normalize(x) if normalize else x
    d = (unit[:, None] - unit).square().sum(-1)
    if not squared:
        d = torch.where(torch.eye(len(x), dtype=torch.bool), 0, d).clamp_min(1e-30).sqrt()
    losses = []
    for a in range(len(x)):
        if y[a] == ignore_index:
            continue
        positives = [p for p in range(len(x)) if y[p] == y[a] and p != a]
        negatives = [n for n in range(len(x)) if y[n] not in (y[a], ignore_index)]
        if not positives or not negatives:
            continue
        if mining == "batch_hard":
            farthest = max(d[a, p] for p in positives)
            losses.append(farthest - min(d[a, n] for n in negatives))
            continue
        for p in positives:
            farther = [d[a, n] for n in negatives if d[a, n] > d[a, p]]
            chosen = min(farther) if farther else max(d[a, n] for n in negatives)
            losses.append(d[a, p] - chosen)
    if not losses:
        return x.sum() * 0
    difference = torch.stack(losses)
    losses = difference.exp().log1p() if margin == "soft" else (difference + margin).clamp_min(0)
    return losses[losses > 0].mean() if mean_over == "nonzero" else losses.mean()


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("block_rows", [5, 64])
@pytest.mark.parametrize("n, classes", [(37, 9), (37, 1), (12, 40), (1, 1)])
def test_matches_loops(mining, block_rows, n, classes, device):
    x, y = batch(n, classes)
    y[::6] = -100
    loss = TripletLoss(0.3, mining=mining, block_rows=block_rows)
    x.requires_grad_()
    expected = by_loops(x, y, 0.3, mining)
    (slope,) = torch.autograd.grad(expected, x)
    leaf = x.detach().to(device).requires_grad_()
    ours = loss(leaf, y.to(device))
    torch.testing.assert_close(ours.cpu(), expected)
    (ours_slope,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours_slope.cpu(), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(squared=False, normalize=False),
        dict(squared=False, mean_over="nonzero"),
        dict(normalize=False, mean_over="nonzero"),
        dict(margin="soft", squared=False, normalize=False),
        dict(margin="soft"),
    ],
    ids=str,
)
def test_options_match_loops(settings, mining, device):
    x, y = batch()
    y[::6] = -100
    settings = dict(dict(margin=0.3, mining=mining), **settings)
    x.requires_grad_()
    expected = by_loops(x, y, **settings)
    (slope,) = torch.autograd.grad(expected, x)
    leaf = x.detach().to(device).requires_grad_()
    ours = TripletLoss(block_rows=16, **settings)(leaf, y.to(device))
    torch.testing.assert_close(ours.cpu(), expected)
    (ours_slope,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours_slope.cpu(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
def test_no_matrix_of_the_batch_is_kept(mining, squared, device):
    n, kept = 512, []
    x, y = batch(n, 100, torch.float32)
    x = x.to(device).requires_grad_()

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = TripletLoss(mining=mining, squared=squared, block_rows=32)(x, y.to(device))
    assert kept and max(kept) < 32 * n * 4
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("options", [{}, dict(squared=False), dict(normalize=False)], ids=str)
def test_equal_and_zero_embeddings_stay_finite(options, mining, dtype, device):
    x = torch.ones(8, 4, dtype=dtype, device=device)
    x[3] = 0
    x.requires_grad_()
    loss = TripletLoss(mining=mining, **options)(x, torch.arange(8, device=device) // 2)
    (slope,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and slope.isfinite().all()


def test_refusals():
    x, y = batch()
    with pytest.raises(ValueError, match=r"labels: expected int64 \(37,\)"):
        TripletLoss()(x, y.int())
    with pytest.raises(ValueError, match=r"mining: .*'hardest'"):
        TripletLoss(mining="hardest")
    with pytest.raises(ValueError, match=r"mean_over: .*'hard'"):
        TripletLoss(mean_over="hard")
    with pytest.raises(TypeError, match=r"squared: expected a bool, got int 1"):
        TripletLoss(squared=1)


def test_semi_hard_negatives_are_strictly_farther(device):
    """Passes over a negative as far as the positive, and takes one that is farther."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]], device=device)
    y = torch.tensor([0, 0, 1, 2], device=device)
    # both anchors have their positive at 2 and their negatives at 2 and 4
    assert TripletLoss(0.3, mining="semi_hard")(x, y) == 0
