# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests rows with several labels against one softmax for each label."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import marginkernels as mk
from marginkernels import margin_cross_entropy
from marginkernels.optim import SGD
from marginkernels.testing import assert_within_budget
from tests.support import workers

F64 = torch.float64
N, C, D, L = 13, 40, 12, 3


def operands(seed: int = 0, sub_centers: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, C, (N, L), generator=generator)
    y[0, 1] = y[0, 0]  # twice
    y[1, 2], y[2], y[3, 1:] = -100, -100, -100
    weights = torch.rand(N, L, generator=generator, dtype=F64)
    weights[4, 1] = 0
    return dict(
        x=torch.randn(N, D, generator=generator, dtype=F64),
        w=torch.randn(C * sub_centers, D, generator=generator, dtype=F64),
        y=y, label_weights=weights, bias=torch.randn(C, generator=generator, dtype=F64),
    )  # fmt: skip


def expected(
    given: dict[str, Any],
    margin: nn.Module,
    scale: Tensor,
    other_labels: str,
    negatives: Any = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the losses of the rows label by label, each by F.cross_entropy of its own logits.

    Args:
        negatives: maps the cosines of a row (C,) and that of its nearest label to those that
            negatives have; None: the cosines.
    """
    y, weights, bias = given["y"], given.get("label_weights"), given.get("bias")
    c = F.normalize(given["x"]) @ F.normalize(given["w"]).T
    c = c.unflatten(1, (C, -1)).amax(2)  # of the nearest centre
    rows = []
    for i in range(N):
        labels = [
            (k, int(j)) for k, j in enumerate(y[i])
            if j != -100 and (weights is None or weights[i, k] != 0)
        ]  # fmt: skip
        classes = {j for _, j in labels}
        loss = given["x"].sum() * 0
        others = c[i]
        if negatives is not None and labels:
            others = negatives(c[i], c[i, list(classes)].max().detach())
        for k, j in labels:
            t = margin(c[i, j].reshape(1), mk.Rows(torch.tensor([j]), c[i, :1], None, None))
            z = scale * torch.where(F.one_hot(torch.tensor(j), C) == 1, t, others)
            z = z if bias is None else z + bias
            out = classes - {j} if other_labels == "exclude" else set()
            kept = [q for q in range(C) if q not in out]
            target = torch.tensor([kept.index(j)])
            weight = 1 / len(labels) if weights is None else weights[i, k]
            nll = F.cross_entropy(z[kept][None], target, label_smoothing=label_smoothing)
            loss = loss + weight * nll
        rows.append(loss)
    return torch.stack(rows)


def judged(got: Tensor, exact: Tensor, leaves: list[Tensor], their_leaves: list[Tensor]) -> None:
    """Compares losses, and gradients of an uneven sum of them."""
    upstream = torch.linspace(0.5, 1.5, N, dtype=F64)
    pairs = [(got, exact)]
    pairs += zip(
        torch.autograd.grad((got * upstream.to(got)).sum(), leaves),
        torch.autograd.grad((exact * upstream).sum(), their_leaves), strict=True,
    )  # fmt: skip
    for a, b in pairs:
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("smoothing, sub_centers", [(0.0, 1), (0.1, 1), (0.1, 3)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("mode", ["exclude", "negatives"])
def test_each_label_has_a_softmax(mode, weighted, smoothing, sub_centers):
    given = operands(sub_centers=sub_centers)
    if not weighted:
        del given["label_weights"], given["bias"]
    scale = torch.tensor(9.0, dtype=F64)
    sides = []
    for function in (margin_cross_entropy, None):
        own = {k: t.clone().requires_grad_(k != "y") for k, t in given.items()}
        s = scale.clone().requires_grad_()
        margin = mk.ArcFace(0.3)
        if function is None:
            losses = expected(own, margin, s, mode, label_smoothing=smoothing)
        else:
            losses = function(
                **own, margin=margin, scale=s, other_labels=mode, label_smoothing=smoothing,
                reduction="none", sub_centers=sub_centers,
            )  # fmt: skip
        sides.append((losses, [s, *(t for k, t in own.items() if k != "y")]))
    (got, leaves), (exact, theirs) = sides
    judged(got, exact, leaves, theirs)


def mv_softmax(c: Tensor, nearest: Tensor) -> Tensor:
    return torch.where(c > nearest - 0.35, 1.2 * c + 0.2, c)


@pytest.mark.parametrize("mode", ["exclude", "negatives"])
def test_transforms_take_the_nearest_label_for_the_target(mode):
    given = operands()
    del given["bias"]
    sides = []
    for is_ours in (True, False):
        own = {k: t.clone().requires_grad_(k != "y") for k, t in given.items()}
        margin, s = mk.MVSoftmax(0.35, t=0.2), torch.tensor(9.0, dtype=F64)
        if is_ours:
            losses = margin_cross_entropy(
                **own, margin=margin, scale=s, other_labels=mode, reduction="none"
            )
        else:
            losses = expected(own, margin, s, mode, mv_softmax)
        sides.append((losses, [t for k, t in own.items() if k != "y"]))
    (got, leaves), (exact, theirs) = sides
    judged(got, exact, leaves, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_fp64(dtype, backend, device):
    given = operands()
    x, w = (given[k].to(dtype).to(device).requires_grad_() for k in "xw")
    y, weights = given["y"].to(device), given["label_weights"].float().to(device)
    results = []
    for name, wide in ((backend, False), ("reference", False), ("reference", True)):
        leaves = [t.detach().double() if wide else t.detach() for t in (x, w)]
        leaves = [t.requires_grad_() for t in leaves]
        loss = margin_cross_entropy(
            *leaves, y, margin=mk.CosFace(0.3), scale=16.0, label_weights=weights, backend=name
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for what, got, plain, exact in zip(("loss", "dx", "dw"), *results, strict=True):
        got, plain, exact = (t.reshape(1, -1) for t in (got, plain, exact))
        assert_within_budget(what, got, [plain], exact, 4)


def test_one_label_in_two_dimensions_is_one_label(backend, device):
    given = {k: t.to(device) for k, t in operands().items()}
    x, w, y = given["x"].float(), given["w"].float(), given["y"][:, 0]
    settings = dict(margin=mk.ArcFace(0.3), scale=16.0, backend=backend, return_stats=True)
    (one, a), (two, b) = (margin_cross_entropy(x, w, t, **settings) for t in (y, y[:, None]))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(a.row_loss, b.row_loss)
    assert torch.equal(a.correct, b.correct[:, 0])


def test_mixup_is_the_mean_of_two_calls(backend, device):
    given = {k: t.to(device) for k, t in operands().items()}
    x, w, y = given["x"].float(), given["w"].float(), torch.randint(0, C, (N, 2), device=device)
    y[:, 1] = (y[:, 0] + 1) % C
    settings = dict(margin=mk.CosFace(0.2), scale=12.0, backend=backend)
    weights = torch.tensor([0.7, 0.3], device=device).expand(N, 2)
    got = margin_cross_entropy(
        x, w, y, label_weights=weights, other_labels="negatives", **settings
    )  # fmt: skip
    a, b = (margin_cross_entropy(x, w, label, **settings) for label in y.unbind(1))
    torch.testing.assert_close(got, 0.7 * a + 0.3 * b)


def test_a_fused_step_moves_what_a_plain_one_moves(backend, device):
    given = {k: t.to(device) for k, t in operands().items()}
    weights = []
    for fused in (True, False):
        torch.manual_seed(1)
        head = mk.MarginSoftmaxHead(
            D, C, margin=mk.ArcFace(0.3), scale=16.0, backend=backend, device=device
        )
        with torch.no_grad():
            head.weight.copy_(given["w"])
        if not fused:
            optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        elif mk.backends.get(backend).updates:
            optimizer = SGD(head, lr=0.1)
        else:
            pytest.skip("no steps")
        for _ in range(2):
            loss = head(
                given["x"].float(), given["y"], label_weights=given["label_weights"].float()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_compiled_call_takes_any_number_of_labels():
    head = mk.MarginSoftmaxHead(
        D, C, margin=mk.ArcFace(0.3), scale=16.0, backend="reference", other_labels="negatives"
    )

    def loss(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return head(x, y, label_weights=weights)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, labels in ((6, 3), (9, 3), (5, 4)):
        given = (torch.randn(n, D), torch.randint(0, C, (n, labels)), torch.rand(n, labels))
        results = []
        for function in (loss, compiled):
            value = function(*given)
            results.append([value, *torch.autograd.grad(value, head.weight)])
        torch.testing.assert_close(*results)


def test_a_sample_holds_all_labels():
    given = operands()
    sampling = mk.PartialFC(0.05, generator=torch.Generator().manual_seed(0))
    x, w = given["x"], given["w"].requires_grad_()
    settings = dict(margin=mk.NSoftmax(), scale=8.0, sampling=sampling)
    loss = margin_cross_entropy(x, w, given["y"], **settings)
    (dw,) = torch.autograd.grad(loss, w)
    moved = set(torch.unique(given["y"][given["y"] >= 0]).tolist())
    assert loss.isfinite() and moved <= set(dw.abs().sum(1).nonzero()[:, 0].tolist())


def sharded_statistics() -> list[Tensor]:
    given, rank = operands(), torch.distributed.get_rank()
    shard = mk.ClassShard.chunked(C, torch.distributed.group.WORLD)
    rows = slice(0, 5) if rank == 0 else slice(5, N)
    loss, stats = margin_cross_entropy(
        given["x"][rows], given["w"][shard.start : shard.stop], given["y"][rows],
        label_weights=given["label_weights"][rows], margin=mk.CosFace(0.2), scale=16.0,
        shard=shard, return_stats=True,
    )  # fmt: skip
    return [loss, *stats]


def test_ranks_agree_with_one_process():
    given = operands()
    loss, stats = margin_cross_entropy(
        given["x"], given["w"], given["y"], label_weights=given["label_weights"],
        margin=mk.CosFace(0.2), scale=16.0, return_stats=True,
    )  # fmt: skip
    for got in workers.run(2, sharded_statistics):
        torch.testing.assert_close(got, [loss, *stats])
    assert stats.target_cosine.shape == stats.correct.shape == (N, L)


BAD = {
    "y: expected shape": dict(y=torch.zeros(N, 2, 2, dtype=torch.int64)),
    r"y: expected shape \(13,\), .*got \(13, 0\)": dict(y=torch.zeros(N, 0, dtype=torch.int64)),
    "label_weights: expected None for labels": dict(y=torch.zeros(N, dtype=torch.int64)),
    "label_weights: expected shape": dict(label_weights=torch.ones(N, 2)),
    "label_weights: expected finite weights >= 0, got -1": dict(label_weights=-torch.ones(N, L)),
    "label_weights: expected finite weights >= 0, got nan": dict(
        label_weights=torch.full((N, L), math.nan)
    ),
    "other_labels: expected one of": dict(other_labels="ignore"),
    "y: expected labels .* got 99 in row 7": dict(
        y=torch.full((N, L), 5).index_fill(0, torch.tensor(7), 99)
    ),
    "save_tiles: cannot be True with several labels": dict(save_tiles=True),
    "y: expected labels .* with AdaCos": dict(scale=mk.AdaCos(C)),
}


@pytest.mark.parametrize("complaint", BAD)
def test_bad_input_is_named(complaint):
    given = operands()
    del given["bias"]
    settings = dict(given, margin=mk.NSoftmax(), scale=8.0) | BAD[complaint]
    with pytest.raises(ValueError, match=complaint):
        margin_cross_entropy(**settings)
