# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that a step does not wait for its device, and steps on GPUs.

The latter cover streams, several devices, captured graphs and peak memory.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import AdaCos, ArcFace, MarginSoftmaxHead, NSoftmax, PartialFC, device_checks
from marginkernels.backends import reasons
from tests.support.losses import LOSSES, C, operands

GPU_BACKENDS = ("triton", "native")

# operators that read a value of a tensor on the host, or whose size depends on one
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class RefuseWaits(TorchDispatchMode):
    """Raises where an operator would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [t for t in args[1] if t is not None and t.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def heads():
    """Yields settings of a head for each loss, and for each option that has code of its own."""
    for name, loss in LOSSES.items():
        settings = dict(margin=loss.make(), scale=loss.scale, normalize=loss.normalize)
        yield name, settings
    arcface = dict(margin=ArcFace(), scale=16.0)
    yield "AdaCos", dict(margin=NSoftmax(), scale=AdaCos(C))
    yield "AdaCos delayed", dict(margin=NSoftmax(), scale=AdaCos(C, delayed=True))
    yield (
        "smoothing, z-loss, focal",
        arcface | dict(label_smoothing=0.1, z_loss=1e-3, focal_gamma=2.0, bias=True),
    )
    yield "table", dict(margin=ArcFace(torch.rand(C)), scale=torch.nn.Parameter(torch.tensor(8.0)))
    yield "sample", arcface | dict(sampling=PartialFC(0.5, logq=True))


HEADS = dict(heads())


@pytest.mark.parametrize("name", HEADS)
def test_a_step_does_not_wait_for_the_device(name, device, monkeypatch):
    monkeypatch.setattr(device_checks, "checks_values", lambda tensor: False)  # as on a GPU
    head = MarginSoftmaxHead(8, C, **HEADS[name]).to(device)
    x, _, y = (t.to(device) for t in operands(dtype=torch.float32))
    y[::7] = -100
    x.requires_grad_()
    weights = torch.rand(len(x), device=device)
    with RefuseWaits():
        loss, _ = head(x, y, sample_weight=weights, return_stats=True)
        loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request):
    why_not = reasons(request.param, "cuda")
    if why_not:
        pytest.skip("; ".join(why_not))
    return request.param


def make(backend, device="cuda", classes=3000, **settings):
    torch.manual_seed(0)
    head = MarginSoftmaxHead(
        64, classes, margin=ArcFace(), scale=64.0, backend=backend, device=device, **settings
    )
    x = torch.randn(200, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    return head, x, torch.randint(classes, (200,), device=device)


def step(head, x, y):
    """Returns the loss and gradients of one step."""
    loss = head(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, [x, head.weight])]


def assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_step_makes_no_synchronising_call(gpu_backend):
    head, x, y = make(gpu_backend)
    expected = step(head, x, y)  # the first step compiles kernels, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(head, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, expected)


def test_a_step_on_another_stream(gpu_backend):
    head, x, y = make(gpu_backend)
    expected = step(head, x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(side):
            got = step(head, x, y)
        # meanwhile, take and return memory of the other stream's pool
        torch.full((1 << 24,), torch.nan, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, expected)


def test_a_step_on_a_device_that_is_not_the_current_one(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        got = step(*make(gpu_backend, device="cuda:1"))
    assert all(t.device.index == 1 for t in got)
    head, x, y = make(gpu_backend, device="cuda:1")
    with torch.cuda.device(1):
        here = step(head, x, y)
    assert_same(got, here)


def test_a_captured_step_sees_new_inputs(gpu_backend):
    head, x, y = make(gpu_backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(head, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(head, x, y)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            x.normal_(generator=generator)
            y.random_(head.num_classes, generator=generator)
        graph.replay()
        assert_same(captured, step(head, x, y))


def test_peak_memory_of_a_step_is_no_matrix_of_logits(gpu_backend):
    head, x, y = make(gpu_backend, classes=400_000, save_tiles=False)
    step(head, x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step(head, x, y)
    beyond = torch.cuda.max_memory_allocated() - before
    beyond -= sum(t.numel() * t.element_size() for t in gradients)
    logits = 4 * len(x) * head.num_classes
    assert beyond < logits / 2, f"{beyond / logits:.2f} of an fp32 matrix of logits"


@pytest.mark.parametrize("wrong", [3000, 10**9, -1, -(2**40)])
def test_a_label_out_of_range_is_a_loss_of_nan(gpu_backend, wrong):
    head, x, y = make(gpu_backend, reduction="none")
    expected = head(x, y)
    y[3] = wrong
    got = head(x, y)
    torch.cuda.synchronize()  # nothing was read or written out of bounds
    assert got[3].isnan()
    others = torch.arange(len(x), device="cuda") != 3
    assert torch.equal(got[others], expected[others])
