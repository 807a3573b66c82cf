# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the multi-label head with LLaVA-OneVision-Encoder's formulas on the dense logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from marginkernels.compat import insightface
from marginkernels.compat.onevision import CombinedMarginLoss, PartialFC_V2
from tests.support import workers

C, D, L, F64 = 29, 6, 10, torch.float64
LOSSES = {"cos": (0.3, 0), "cos, filtered": (0.3, 0.2), "arc": (0.0, 0)}  # m3 and the threshold


def head(name="cos", **settings):
    m3, threshold = LOSSES[name]
    loss = CombinedMarginLoss(64, 1, 0 if m3 else 0.4, m3, threshold)
    return PartialFC_V2(loss, D, C, **{"fp16": False, "bf16": False} | settings).double()


def batch(n, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(n, D, dtype=F64, generator=generator).requires_grad_()
    return x, torch.randint(C, (n, L), generator=generator)


def drawn(labels, random_diff, count, seed):
    """Returns the labels that the project takes at a seed."""
    torch.manual_seed(seed)
    return labels.gather(1, torch.rand(len(labels), random_diff).argsort(1)[:, :count])


def dense(name, x, w, labels):
    """Computes the mean over rows and labels, each label with logits of its own."""
    m3, threshold = LOSSES[name]
    cosine, losses = F.normalize(x) @ F.normalize(w).T, []
    for y in labels.T:
        c = cosine.gather(1, y[:, None])
        target = c - m3 if m3 else torch.cos(torch.acos(c.detach()) + 0.4) + (c - c.detach())
        others = cosine.masked_fill(cosine > threshold, 0) if threshold else cosine
        losses.append(F.cross_entropy(64 * others.scatter(1, y[:, None], target), y))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("random_diff, count", [(10, 8), (9, 3), (5, 8)])
def test_one_sweep_has_the_loss_of_a_softmax_per_label(name, random_diff, count):
    module = head(name, labels_per_row=count)
    x, y = batch(7)
    taken = drawn(y, random_diff, count, seed=4)
    assert taken.shape == (7, min(random_diff, count))
    torch.manual_seed(4)
    loss = module(x, y, random_diff)
    expected = dense(name, x, module.weight, taken)
    leaves = [x, module.weight]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(taken.shape[1] * expected, leaves),  # the project's are of the sum
    )


def rank_step(sizes, sample_rate):
    rank = dist.get_rank()
    module = head(sample_rate=sample_rate)
    x, y = batch(sizes[rank], seed=rank)
    torch.manual_seed(10 + rank)
    loss = module(x, y, L)
    loss.backward()
    index = torch.arange(module.num_local) if module.weight_index is None else module.weight_index
    return module.weight.detach(), loss.detach(), x.grad, module.weight.grad, index


@pytest.mark.parametrize("sample_rate", [1.0, 0.6, 0.1])
def test_two_ranks_with_batches_of_two_sizes(sample_rate):
    sizes = (2, 3) if sample_rate == 0.6 else (4, 7)
    weights, losses, dx, dw, index = zip(
        *workers.run(2, rank_step, sizes, sample_rate), strict=True
    )
    assert [len(w) for w in weights] == [15, 14]
    x = torch.cat([batch(n, r)[0].detach() for r, n in enumerate(sizes)]).requires_grad_()
    y = torch.cat([drawn(batch(n, r)[1], L, 8, seed=10 + r) for r, n in enumerate(sizes)])
    w = torch.cat(weights).requires_grad_()
    # on the classes of one sample, which has all labels in it
    sampled = torch.cat([index[0], 15 + index[1]])
    place = torch.searchsorted(sampled, y)
    assert torch.equal(sampled[place], y)
    expected = dense("cos", x, w[sampled], place)
    (8 * expected).backward()
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat(dw), w.grad)
    torch.testing.assert_close(torch.cat(dx), 2 * x.grad)


def test_bfloat16_is_the_default_as_in_the_project():
    (x, y), losses = batch(7), []
    for settings in ({"bf16": False}, {"bf16": True}):
        torch.manual_seed(0)
        losses.append(head(**settings).float()(x.float(), y, L))
    assert PartialFC_V2(CombinedMarginLoss(64, 1, 0, 0.3), D, C).bf16
    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


def test_weights_are_those_of_the_single_label_head():
    one = insightface.PartialFC_V2(CombinedMarginLoss(64, 1, 0, 0.3), D, C).double()
    module = head(labels_per_row=1)
    assert list(module.state_dict()) == ["weight"]
    module.load_state_dict(one.state_dict())
    x, y = batch(5)
    torch.testing.assert_close(module(x, y[:, :1], 1), one(x, y[:, 0]))


def test_wrong_arguments_are_named():
    module, (x, y) = head(), batch(5)
    for given, error in (
        ((x, y[:, 0], 10), r"local_labels: expected shape \(5, L\), .* got \(5,\)"),
        ((x, y, 11), r"random_diff: expected an integer in \[1, 10\], got 11"),
        ((x, y + C, 10), r"local_labels: expected labels in \[0, 29\), got"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            module(*given)
    with pytest.raises(TypeError, match=r"^margin_loss: expected a MarginLoss .* got function"):
        PartialFC_V2(dense, D, C)
    with pytest.raises(ValueError, match=r"^is_normlize: expected 1, .* got 0"):
        head(is_normlize=0)
