# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the head inside PyTorch: autocast, GradScaler, accumulation, learnable settings, saving."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import (
    ArcFace,
    CosFace,
    MarginSoftmaxHead,
    NSoftmax,
    backends,
    evaluation,
    margin_cross_entropy,
    ops,
)
from marginkernels.sweep import saves_tiles
from marginkernels.testing import plain_margin_cross_entropy
from tests.support.small import C, D, N, batch, make_head


def test_autocast_decides_the_compute_type(backend, device):
    head = make_head(backend, device, compute_dtype=None)
    x, y = batch(device)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = head(x, y)
        (gradient,) = torch.autograd.grad(under_autocast, head.weight, retain_graph=True)
    head.compute_dtype = torch.bfloat16
    loss = head(x, y)
    assert torch.equal(under_autocast, loss) and loss.dtype == torch.float32
    assert torch.equal(gradient, torch.autograd.grad(loss, head.weight)[0])
    head.compute_dtype = torch.float32
    assert not torch.equal(under_autocast, head(x, y))


def test_either_operand_in_fp64_decides_the_compute_type(device):
    x, y = batch(device)
    single = make_head("auto", device)
    double = copy.deepcopy(single).double()
    with torch.autocast(device, torch.bfloat16):
        expected = double(x.double(), y)
        assert expected.dtype == torch.float64
        assert torch.equal(single(x.double(), y), expected)
        assert torch.equal(double(x, y), expected)


class InFP64(torch.nn.Module):
    def forward(self, c, rows):
        return c.double() - 0.25


def test_numbers_and_types_of_scale_and_margin_do_not_change_the_loss(device):
    head = make_head("auto", device, margin=CosFace(0.25))
    x, y = batch(device)
    expected = head(x, y)
    for scale in (16, np.float32(16), np.int64(16), torch.tensor(16.0, dtype=torch.float64)):
        head.scale = scale
        torch.testing.assert_close(head(x, y), expected)
    for dtype in (torch.float16, torch.float64):
        row_margin = torch.full((N,), 0.25, dtype=dtype, device=device)
        torch.testing.assert_close(head(x, y, row_margin=row_margin), expected)
        head.margin = CosFace(torch.full((C,), 0.25, dtype=dtype, device=device))
        torch.testing.assert_close(head(x, y), expected)
    head.margin = InFP64()
    torch.testing.assert_close(head(x, y), expected)


def test_grad_scaler_with_fp16(backend, device):
    head = make_head(backend, device)
    x, y = batch(device, dtype=torch.float16)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before, expected = head.weight.detach().clone(), copy.deepcopy(head)
    scaler.scale(head(x, y)).backward()
    scaler.step(optimizer)
    expected(x, y).backward()
    torch.testing.assert_close(
        head.weight, before - 0.1 * expected.weight.grad, rtol=1e-4, atol=1e-6
    )
    # a scale that overflows dx in fp16 gives inf, not NaN or a silent number
    leaf = x.clone().requires_grad_()
    (head(leaf, y) * 1e8).backward()
    assert leaf.grad.isinf().any() and not leaf.grad.isnan().any()


def test_gradients_accumulate_and_scale(backend, device):
    head = make_head(backend, device, reduction="sum")
    x, y = batch(device)
    head(x, y).backward()
    whole = head.weight.grad.clone()
    head.zero_grad()
    for part in range(3):
        (2.5 * head(x[part::3], y[part::3])).backward()
    torch.testing.assert_close(head.weight.grad, 2.5 * whole, rtol=1e-4, atol=1e-4)
    loss = head(x, y)
    head.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * whole)


@pytest.fixture
def asked(monkeypatch):
    """Records the settings of every call of an op, in turn."""
    calls = []

    def spy(handle):
        def of_backend(backend):
            op = handle(backend)
            return lambda *args, **settings: calls.append(settings) or op(*args, **settings)

        return of_backend

    for name in ("head_fwd", "head_bwd"):
        monkeypatch.setattr(ops, name, spy(getattr(ops, name)))
    return calls


def test_no_work_for_a_gradient_nobody_needs(backend, device, asked):
    head = make_head(backend, device, bias=True)
    x, y = batch(device)
    names = ("need_x", "need_w", "need_bias", "need_scale")
    for x_needs, w_needs in ((False, True), (True, False), (True, True)):
        x.requires_grad_(x_needs)
        head.requires_grad_(w_needs)
        head(x, y).backward()
        assert [asked[-1][name] for name in names] == [x_needs, w_needs, w_needs, False]
    assert not head.requires_grad_(False)(x.detach(), y).requires_grad


def test_stats_and_smoothing_are_computed_only_where_asked_for(backend, device, asked):
    head = make_head(backend, device)
    x, y = batch(device)
    for smoothing, stats in ((0.0, False), (0.1, False), (0.0, True)):
        head.label_smoothing = smoothing
        head(x, y, return_stats=stats)
        assert (asked[-1]["want_sum"], asked[-1]["want_max"]) == (smoothing > 0, stats)


def test_no_grad_keeps_nothing(backend, device, asked):
    keeps_tiles = backends.get(backend).keeps_tiles
    head = make_head(backend, device, save_tiles=True if keeps_tiles else "auto")
    x, y = batch(device)
    assert head(x.requires_grad_(), y).requires_grad
    assert asked[-1]["save_tiles"] == keeps_tiles
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = head(x, y)
        assert loss.grad_fn is None and not asked[-1]["save_tiles"]


def test_automatic_tiles_stay_below_256_mib():
    for compute_dtype, n in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float32, 49)):
        for c, kept in ((1 << 20, True), ((1 << 20) + 1, False)):
            assert saves_tiles("auto", [], n, c, compute_dtype, "native") == kept
            assert saves_tiles(True, [], n, c, compute_dtype, "native")


def test_learnable_scale_margin_and_module_scale(backend, device):
    class Temperature(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log = torch.nn.Parameter(torch.tensor(2.0, device=device))

        def forward(self):
            return self.log.exp()

    m = torch.nn.Parameter(torch.tensor(0.2, device=device))
    head = make_head(backend, device, margin=CosFace(m), scale=Temperature())
    assert {"scale.log", "margin.m"} <= {name for name, _ in head.named_parameters()}
    x, y = batch(device)
    head(x, y).backward()
    scale = head.scale.log.detach().clone().requires_grad_()
    weight = head.weight.detach()
    plain = plain_margin_cross_entropy(x, weight, y, margin=CosFace(m.detach()), scale=scale.exp())
    plain_grads = torch.autograd.grad(plain, scale)
    torch.testing.assert_close(head.scale.log.grad, plain_grads[0], rtol=1e-4, atol=1e-6)
    assert m.grad.isfinite() and m.grad != 0


def test_the_head_passes_every_setting_on(device):
    settings = dict(
        margin=CosFace(0.3), scale=3.0, normalize="weight", reduction="none", ignore_index=7,
        label_smoothing=0.2, compute_dtype=torch.bfloat16, save_tiles=False, backend="reference",
    )  # fmt: skip
    head = MarginSoftmaxHead(D, C, bias=True, device=device, **settings)
    x, y = batch(device)
    y[:2] = 7
    torch.nn.init.normal_(head.bias)
    call = dict(sample_weight=torch.rand(N, device=device), row_margin=torch.rand(N, device=device))
    loss, stats = head(x, y, return_stats=True, **call)
    expected, expected_stats = margin_cross_entropy(
        x, head.weight, y, bias=head.bias, return_stats=True, **settings, **call
    )
    assert all(
        torch.equal(a, b) for a, b in zip((loss, *stats), (expected, *expected_stats), strict=True)
    )


def test_logits_and_topk_need_no_labels(device):
    for normalize in ("both", "weight", "none"):
        head = MarginSoftmaxHead(
            D, 9000, margin=NSoftmax(), scale=3.0, bias=True, normalize=normalize, device=device
        )
        torch.nn.init.normal_(head.bias, std=0.1)
        torch.nn.init.normal_(head.weight)
        x, y = batch(device)
        logits = head.logits(x)
        expected = torch.nn.functional.cross_entropy(logits, y)
        torch.testing.assert_close(head(x, y), expected)
        values, classes = head.topk(x, 7)
        torch.testing.assert_close(values, logits.topk(7).values)
        assert torch.equal(logits.gather(1, classes), values)
    assert head.topk(x, 9000)[0].shape == (N, 9000)


class LargestResult(TorchDispatchMode):
    """Records the most numbers in any tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return result


def test_topk_never_holds_all_logits(device, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 300)
    head = MarginSoftmaxHead(4, 3100, margin=NSoftmax(), scale=3.0, bias=True, device=device)
    x = torch.randn(N, 4, device=device, requires_grad=True)
    expected = head.logits(x).topk(5)
    with LargestResult() as largest:
        values, classes = head.topk(x, 5)
    assert torch.equal(values, expected.values) and torch.equal(classes, expected.indices)
    assert not values.requires_grad and largest.numel == N * 300


def test_head_copies_pickles_saves_and_prints(device):
    head = make_head(
        "auto", device, bias=True, scale=torch.tensor(16.0), margin=ArcFace(torch.rand(C))
    )
    x, y = batch(device)
    expected = head(x, y)
    clones = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    loaded = make_head(
        "auto", device, bias=True, scale=torch.tensor(1.0), margin=ArcFace(torch.zeros(C))
    )
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for clone in [*clones, loaded]:
        assert torch.equal(clone(x, y), expected)
    assert set(head.state_dict()) == {"weight", "bias", "scale", "margin.m"}
    assert "num_classes=50" in repr(head) and "ArcFace" in repr(head)


def test_meta_device():
    head = MarginSoftmaxHead(512, 10**8, margin=ArcFace(), scale=64.0, device="meta")
    assert head.weight.shape == (10**8, 512) and "100000000" in repr(head)
    small = MarginSoftmaxHead(D, C, margin=ArcFace(), scale=64.0, device="meta").to_empty(
        device="cpu"
    )
    small.reset_parameters()
    assert small.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_gradcheck_of_the_reference():
    for normalize in ("both", "weight", "none"):
        x, w, bias = (
            torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (6, 3), (6,))
        )
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        y = torch.tensor([0, 5, 5, 2])

        def loss(x, w, bias, scale, normalize=normalize, y=y):
            return margin_cross_entropy(
                x, w, y, margin=ArcFace(0.3), scale=scale, bias=bias, normalize=normalize,
                label_smoothing=0.1, reduction="none", backend="reference",
            )  # fmt: skip

        assert torch.autograd.gradcheck(loss, (x, w, bias, scale))
