# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The head inside PyTorch: ops, torch.compile, autocast, GradScaler, accumulation, saving."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from marginkernels import ArcFace, CosFace, MarginSoftmaxHead, NSoftmax, margin_cross_entropy, ops
from marginkernels.testing import plain_margin_cross_entropy

N, C, D = 12, 50, 8


def make_head(backend, device, **settings):
    settings = dict(dict(margin=ArcFace(0.3), scale=16.0), **settings)
    return MarginSoftmaxHead(D, C, backend=backend, device=device, **settings)


def batch(device, n=N, dtype=torch.float32):
    return torch.randn(n, D, device=device, dtype=dtype), torch.randint(0, C, (n,), device=device)


def op_arguments(backend, device, compute_dtype, save_tiles):
    x, y = batch(device)
    w, scale = torch.randn(C, D, device=device), torch.tensor(16.0, device=device)
    y[3] = -1
    sides = dict(normalize_x=True, normalize_w=True, compute_dtype=compute_dtype)
    functor = dict(transform="identity", row_parameter=None, constants=None)
    extra = not save_tiles
    bias = torch.randn(C, device=device) if extra else None
    fwd = (
        (x, w, y, scale, bias),
        dict(sides, save_tiles=save_tiles, want_sum=extra, want_max=extra, **functor),
    )
    lse, _, _, _, _, x_inv, w_inv, tiles = ops.head_fwd(backend)(*fwd[0], **fwd[1])
    grads = [torch.randn(N, device=device) for _ in range(4)]
    grads = grads if extra else [*grads[:2], None, None]
    needs = dict(need_x=True, need_w=True, need_bias=extra, need_scale=extra)
    return fwd, (
        (x, w, y, scale, bias, lse, x_inv, w_inv, tiles, *grads),
        dict(sides, **needs, **functor),
    )


@pytest.mark.parametrize("save_tiles", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compute_dtype, save_tiles, backend, device):
    if save_tiles and backend == "reference":
        pytest.skip("the reference backend keeps no tiles")
    fwd, bwd = op_arguments(backend, device, compute_dtype, save_tiles)
    torch.library.opcheck(ops.head_fwd(backend), *fwd)
    torch.library.opcheck(ops.head_bwd(backend), *bwd)


def test_opcheck_of_the_checks(device):
    y, value = torch.arange(4, device=device), torch.rand(3, device=device)
    torch.library.opcheck(torch.ops.marginkernels.checked, (y, value, 0.0, 1.0, "value"))
    torch.library.opcheck(torch.ops.marginkernels.checked_labels, (y, 4, -100))


def test_compile_is_whole_and_does_not_recompile(backend, device):
    head = make_head(
        backend, device, bias=True, margin=ArcFace(torch.tensor(0.1)), label_smoothing=0.1
    )
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, head):
        loss, stats = head(x, y, return_stats=True)
        return loss, stats.correct

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    sizes = [12, 9, 20, 33, 7]
    for i, n in enumerate(sizes):
        x, y = batch(device, n)
        head.margin.m.fill_(0.1 * i)
        results = []
        for function in (compiled, step):
            leaf = x.clone().requires_grad_()
            loss, correct = function(leaf, y, head)
            results.append(
                [loss, correct, *torch.autograd.grad(loss, (leaf, head.weight, head.bias))]
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # once for the first size, once for any size


@pytest.mark.parametrize("attribute", ["scale", "m"])
def test_compile_recompiles_at_most_once_for_a_number(attribute, backend, device):
    head = make_head(backend, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y: head(x, y), backend=counter, fullgraph=True)
    x, y = batch(device)
    for i in range(5):
        setattr(head if attribute == "scale" else head.margin, attribute, 0.5 + 0.25 * i)
        torch.testing.assert_close(compiled(x, y), head(x, y))
    assert counter.frame_count <= 2


def test_compile_by_inductor(backend, device):
    head = make_head(backend, device)
    x, y = batch(device)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for leaf, function in zip(leaves, (head, torch.compile(head, fullgraph=True)), strict=True):
        head.zero_grad()
        function(leaf, y).backward()
        leaf.weight_grad = head.weight.grad.clone()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(leaves[0].weight_grad, leaves[1].weight_grad)


def test_checks_survive_compilation(backend, device):
    if device != "cpu":
        pytest.skip("values on an accelerator are only checked on request")
    head = torch.compile(make_head(backend, device), backend="aot_eager", fullgraph=True)
    x, y = batch(device)
    y[1] = C
    with pytest.raises(Exception, match=f"got {C} in row 1"):
        head(x, y)


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
    double = MarginSoftmaxHead(
        D, C, margin=NSoftmax(), scale=4.0, device=device, dtype=torch.float64
    )
    assert double(x, y).dtype == torch.float64


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


def test_no_work_for_a_gradient_nobody_needs(backend, device, monkeypatch):
    needs = []
    op = ops.head_bwd(backend)
    monkeypatch.setattr(
        ops,
        "head_bwd",
        lambda _: lambda *a, **k: needs.append((k["need_x"], k["need_w"])) or op(*a, **k),
    )
    head = make_head(backend, device)
    x, y = batch(device)
    head(x, y).backward()
    head.weight.requires_grad_(False)
    head(x.requires_grad_(), y).backward()
    assert needs == [(False, True), (True, False)]
    assert not head(x.detach(), y).requires_grad


def test_no_grad_keeps_nothing(backend, device):
    head = make_head(backend, device)
    x, y = batch(device)
    with torch.no_grad():
        loss = head(x.requires_grad_(), y)
    assert loss.grad_fn is None


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
    copy_m = m.detach().clone().requires_grad_()
    weight = head.weight.detach()
    plain = plain_margin_cross_entropy(
        x, weight, y, margin=CosFace(copy_m.requires_grad_()), scale=scale.exp()
    )
    plain_grads = torch.autograd.grad(plain, scale)
    torch.testing.assert_close(head.scale.log.grad, plain_grads[0], rtol=1e-4, atol=1e-6)
    assert m.grad.isfinite() and m.grad != 0


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
