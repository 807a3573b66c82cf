# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the drop-in for insightface's Partial FC with its formulas on the dense logits."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from marginkernels.compat.insightface import (
    LOSS_CAP,
    ArcFace,
    CombinedMarginLoss,
    CosFace,
    MarginLoss,
    PartialFC_V2,
)
from tests.support import workers

C, D, F64 = 11, 6, torch.float64


def in_place_arcface(logits, labels):
    """Takes angles under no_grad and overwrites both tensors, as insightface does."""
    rows = torch.where(labels[:, 0] != -1)[0]
    with torch.no_grad():
        logits.arccos_()
        logits[rows, labels[rows, 0]] += 0.5
        logits.cos_()
    labels.fill_(7)
    return logits * 64.0


def arc(c, m=0.5):
    return torch.cos(torch.acos(c) + m)


def straight_through(phi):
    return lambda c: phi(c.detach()) + (c - c.detach())


# for each name: a function that makes the margin loss, the function of the target's cosine, and the
# cosine from which on another class is filtered
LOSSES = {
    "ArcFace": (ArcFace, straight_through(arc), 2.0),
    "ArcFace exact": (lambda: ArcFace(gradient="exact"), arc, 2.0),
    "CosFace": (CosFace, lambda c: c - 0.4, 2.0),
    "arc": (
        lambda: CombinedMarginLoss(64, 1.0, 0.3, 0.0),
        straight_through(lambda c: arc(c, 0.3)),
        2.0,
    ),
    "cos, filtered": (
        lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.35, 0.2),
        lambda c: c - 0.35,
        0.2,
    ),
    "any callable": (lambda: in_place_arcface, straight_through(arc), 2.0),
}


def make(name, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PartialFC_V2(LOSSES[name][0](), D, C, **settings).double()


def batch(n, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)  # other numbers than the weights'
    x = torch.randn(n, D, dtype=F64, generator=generator)
    return x.requires_grad_(), torch.randint(C, (n,), generator=generator)


def dense(name, x, w, y, sampled=None):
    """Computes the rows' losses by the formulas, on the classes ``sampled`` or on all."""
    cosine = F.normalize(x) @ F.normalize(w).T
    _, phi, threshold = LOSSES[name]
    target = phi(cosine.gather(1, y[:, None]))
    others = cosine.masked_fill(cosine > threshold, 0)
    logits = 64 * others.scatter(1, y[:, None], target)
    if sampled is not None:
        left_out = torch.ones(len(w), dtype=torch.bool)
        left_out[sampled] = False
        logits = logits.masked_fill(left_out, -math.inf)
    return F.cross_entropy(logits, y, reduction="none")


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_one_process_without_a_group(name):
    head = make(name)
    assert list(head.state_dict()) == ["weight"] and head.weight.shape == (C, D)
    x, y = batch(9)
    labels = y[:, None].clone()
    loss = head(x, labels)
    expected = dense(name, x, head.weight, y).mean()
    same(loss, expected)
    leaves = [x, head.weight]
    same(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    assert torch.equal(labels, y[:, None])


def sharded_step(name, sizes, settings):
    """Returns which classes this rank holds, its loss and its gradients, for uneven batches."""
    rank = torch.distributed.get_rank()
    head = make(name, **settings)
    x, y = batch(sizes[rank], seed=rank)
    torch.manual_seed(3)
    loss = head(x, y)
    loss.backward()
    held = (head.class_start, head.num_local, head.num_sample)
    return held, head.weight.detach(), loss.detach(), x.grad, head.weight.grad


def sample_of(held, y, seed=3):
    """Returns the sampled classes of a rank, by insightface's rule."""
    start, count, num_sample = held
    here = [int(j) - start for j in y.unique() if start <= j < start + count]
    if len(here) > num_sample:
        return [start + j for j in here]
    torch.manual_seed(seed)
    priority = torch.rand(count)
    priority[here] = 2.0
    return [start + int(j) for j in priority.argsort(descending=True)[:num_sample]]


@pytest.mark.parametrize(
    "name, sample_rate",
    [(name, 1.0) for name in LOSSES] + [("CosFace", r) for r in (0.9, 0.3, 0.0)]
    + [("any callable", 0.5)],
)  # fmt: skip
def test_two_ranks(name, sample_rate):
    sizes = (5, 8)
    ranks = workers.run(2, sharded_step, name, sizes, dict(sample_rate=sample_rate))
    held, weights, losses, dx, dw = zip(*ranks, strict=True)
    assert [h[:2] for h in held] == [(0, 6), (6, 5)]  # the first C % W ranks have one class more
    assert not torch.equal(weights[0][:5], weights[1])  # though all ranks were seeded alike
    x = torch.cat([batch(n, rank)[0].detach() for rank, n in enumerate(sizes)]).requires_grad_()
    y = torch.cat([batch(n, rank)[1] for rank, n in enumerate(sizes)])
    w = torch.cat(weights).requires_grad_()
    sampled = None
    if sample_rate < 1:
        assert [h[2] for h in held] == [int(sample_rate * 6), int(sample_rate * 5)]
        sampled = sample_of(held[0], y) + sample_of(held[1], y)
    loss = dense(name, x, w, y, sampled).mean()
    loss.backward()
    for got in losses:
        same(got, loss.detach())
    same(torch.cat(dw), w.grad)
    same(torch.cat(dx), 2 * x.grad)  # DistributedDataParallel averages afterwards


@pytest.mark.parametrize("name", list(LOSSES)[:-1])
def test_the_margin_losses_can_be_called_alone(name):
    x, y = batch(9)
    w = torch.randn(C, D, dtype=F64)
    y[2], labels = 0, y[:, None].clone()
    labels[2] = -1
    logits = LOSSES[name][0]()(F.normalize(x) @ F.normalize(w).T, labels)
    keep = labels[:, 0] >= 0
    same(F.cross_entropy(logits, y, reduction="none")[keep], dense(name, x, w, y)[keep])
    cosine = F.normalize(x[2:3]) @ F.normalize(w).T
    same(logits[2:3], 64 * cosine.masked_fill(cosine > LOSSES[name][2], 0))


def test_the_loss_is_capped_on_request_and_the_gradient_is_not():
    losses, gradients = [], []
    x, y = batch(9)
    for cap in (None, LOSS_CAP):
        torch.manual_seed(0)
        head = make("ArcFace", loss_cap=cap)
        losses.append(head(x, y))
        gradients.append(torch.autograd.grad(losses[-1], [x, head.weight]))
    rows = dense("ArcFace", x, head.weight, y)
    assert rows.max() > LOSS_CAP > rows.min()
    same(losses[0], rows.mean())
    same(losses[1], rows.clamp_max(-math.log(1e-30)).mean())
    same(*gradients)


class Trainer:
    """Is the loop of arcface_torch's train_v2.py in miniature."""

    def __init__(self, margin_loss, sample_rate=1.0):
        torch.manual_seed(2048)
        self.backbone = torch.nn.Linear(D, D)
        if torch.distributed.is_initialized():
            self.backbone = torch.nn.parallel.DistributedDataParallel(self.backbone)
        self.module_partial_fc = PartialFC_V2(margin_loss, D, C, sample_rate, False)
        self.module_partial_fc.train()
        self.optimizer = torch.optim.SGD(
            [
                {"params": self.backbone.parameters()},
                {"params": self.module_partial_fc.parameters()},
            ],
            lr=0.02,
            momentum=0.9,
            weight_decay=5e-4,
        )

    def steps(self, x, y, count):
        losses = []
        for _ in range(count):
            loss = self.module_partial_fc(self.backbone(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), 5)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def checkpoint(self):
        inner = getattr(self.backbone, "module", self.backbone)
        return {
            "epoch": 1,
            "global_step": 10,
            "state_dict_backbone": inner.state_dict(),
            "state_dict_softmax_fc": self.module_partial_fc.state_dict(),
            "state_optimizer": self.optimizer.state_dict(),
        }

    def resume(self, checkpoint):
        inner = getattr(self.backbone, "module", self.backbone)
        inner.load_state_dict(checkpoint["state_dict_backbone"])
        self.module_partial_fc.load_state_dict(checkpoint["state_dict_softmax_fc"])
        self.optimizer.load_state_dict(checkpoint["state_optimizer"])


def train_and_resume(folder):
    rank = torch.distributed.get_rank()
    path = f"{folder}/checkpoint_gpu_{rank}.pt"
    x, y = batch(8, seed=rank)
    x = x.detach().float()
    trainer = Trainer(CombinedMarginLoss(64, 1.0, 0.5, 0.0))
    losses = trainer.steps(x, y, 10)
    torch.save(trainer.checkpoint(), path)
    losses += trainer.steps(x, y, 10)
    again = Trainer(CombinedMarginLoss(64, 1.0, 0.5, 0.0))
    again.resume(torch.load(path, weights_only=True))
    assert again.steps(x, y, 10) == losses[10:]
    return losses


def test_a_training_loop_and_its_checkpoints_of_every_rank(tmp_path):
    losses, others = workers.run(2, train_and_resume, str(tmp_path))
    assert losses == others and losses[-1] < 0.4 * losses[0]
    # the shards of all ranks, one after another, are the weights of a head with all classes
    files = [tmp_path / f"checkpoint_gpu_{rank}.pt" for rank in range(2)]
    shards = [torch.load(f, weights_only=True)["state_dict_softmax_fc"]["weight"] for f in files]
    backbone = torch.load(files[0], weights_only=True)["state_dict_backbone"]
    alone = Trainer(CombinedMarginLoss(64, 1.0, 0.5, 0.0))
    alone.backbone.load_state_dict(backbone)
    alone.module_partial_fc.load_state_dict({"weight": torch.cat(shards)})
    head = mk.MarginSoftmaxHead(D, C, margin=mk.ArcFace(0.5, branch="none"), scale=64.0)
    head.load_state_dict(alone.module_partial_fc.state_dict())
    x, y = (torch.cat(parts) for parts in zip(*[batch(8, seed) for seed in (0, 1)], strict=True))
    embeddings = alone.backbone(x.float())
    for loss in (alone.module_partial_fc(embeddings, y), head(embeddings, y)):
        torch.testing.assert_close(loss.item(), losses[10], rtol=1e-5, atol=1e-6)


def test_other_margins_are_fused_and_callables_are_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = PartialFC_V2(MarginLoss(mk.CurricularFace(0.5), 64.0), D, C)
    x, y = batch(9)
    own = mk.MarginSoftmaxHead(D, C, margin=mk.CurricularFace(0.5), scale=64.0)
    own.load_state_dict(head.state_dict() | {"margin.t": own.margin.t}, strict=False)
    same(head(x.float(), y), own(x.float(), y))
    with pytest.raises(RuntimeError, match="CurricularFace may look at more than cosines"):
        head.margin_softmax(torch.zeros(1, C), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.warns(UserWarning, match="function is not fused") as record:
        head = PartialFC_V2(in_place_arcface, D, C)
        head(x.float(), y)
        head(x.float(), y)
    assert len(record) == 1


def test_fp16_computes_in_half_precision():
    x, y = batch(9)
    losses = []
    for fp16 in (False, True):
        torch.manual_seed(0)
        losses.append(PartialFC_V2(CosFace(), D, C, 1.0, fp16)(x.float(), y))
    assert losses[0] != losses[1]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_what_insightface_does_silently():
    x, y = batch(4)
    with pytest.warns(UserWarning, match="m2=0.5 have no effect with m3=0.4"):
        CombinedMarginLoss(64, 1.0, 0.5, 0.4)
    with pytest.raises(ValueError, match=r"m1, m2, m3: expected m1 = 1 .* got \(1.35, 0.0, 0.0\)"):
        CombinedMarginLoss(64, 1.35, 0.0, 0.0)
    for name in ("CosFace", "any callable"):
        head = make(name)
        for wrong in (C, -1, -100):
            expected = rf"^local_labels: expected labels in \[0, {C}\), got {wrong} in row 2$"
            with pytest.raises(ValueError, match=expected):
                head(x, torch.tensor([1, 2, wrong, 0]))
        with pytest.raises(
            ValueError, match=r"^local_embeddings: expected shape \(N, 6\), got \(4, 5"
        ):
            head(x[:, 1:], y)
        with pytest.raises(ValueError, match=r"^local_labels: expected shape \(4,\).*got \(3,\)"):
            head(x, y[1:])
    for wrong, got in (
        (0.5, "a callable, got float"),
        (CosFace, r"an instance such as CosFace\(\.\.\.\), got the class"),
        (mk.ArcFace(0.5), r"a margin with its scale, MarginLoss\(ArcFace.*got ArcFace alone"),
        (mk.NSoftmax(), "got NSoftmax alone"),
    ):
        with pytest.raises(TypeError, match=f"^margin_loss: expected .*{got}"):
            PartialFC_V2(wrong, D, C)
