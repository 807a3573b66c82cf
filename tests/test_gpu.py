# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests steps on GPUs: streams, several devices, captured graphs, waits, memory and bad labels."""

import contextlib
import runpy
from pathlib import Path

import pytest
import torch

from marginkernels import (
    ArcFace,
    CurricularFace,
    MarginSoftmaxHead,
    PartialFC,
    margin_cross_entropy,
)
from marginkernels.backends import reasons

N, C, D = 200, 3000, 64
EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.gpu


@pytest.fixture(params=("triton", "native"))
def gpu_backend(request):
    why_not = reasons(request.param, "cuda")
    if why_not:
        pytest.skip("; ".join(why_not))
    return request.param


def make(backend, device="cuda", classes=C, **settings):
    torch.manual_seed(0)
    settings = dict(dict(margin=ArcFace(), scale=64.0), **settings)
    head = MarginSoftmaxHead(D, classes, backend=backend, device=device, **settings)
    x = torch.randn(N, D, device=device, dtype=torch.bfloat16, requires_grad=True)
    return head, x, torch.randint(classes, (N,), device=device)


def step(head, x, y):
    """Returns the loss and gradients of one step."""
    loss = head(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, [x, head.weight])]


def draw(x, y, seed):
    """Fills embeddings and labels in place with those of another batch."""
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        x.normal_(generator=generator)
        y.random_(C, generator=generator)


def captured(function, warm_ups=3):
    """Returns a graph of a call, after some calls on a stream of their own, and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@contextlib.contextmanager
def waits_refused():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_step_makes_no_synchronising_call(gpu_backend):
    head, x, y = make(gpu_backend)
    expected = step(head, x, y)  # the first step compiles kernels, which may synchronise
    with waits_refused():
        got = step(head, x, y)
    assert_same(got, expected)


def test_a_step_on_another_stream_beside_a_busy_allocator(gpu_backend):
    head, x, y = make(gpu_backend)
    expected = step(head, x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(side):
            got = step(head, x, y)
            # what a step gives back too early would be overwritten before it is read
            [torch.full((size,), torch.nan, device="cuda") for size in (1 << 10, 1 << 18, 1 << 22)]
        torch.full((1 << 24,), torch.nan, device="cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, expected)


def test_a_step_on_a_device_that_is_not_the_current_one(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        got = step(*make(gpu_backend, device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    with torch.cuda.device(1):
        assert_same(got, step(*make(gpu_backend, device="cuda:1")))


def test_a_captured_step_sees_new_inputs_and_repeats_its_bits(gpu_backend):
    head, x, y = make(gpu_backend)
    graph, result = captured(lambda: step(head, x, y))
    for seed in range(3):
        draw(x, y, seed)
        graph.replay()
        first = [t.clone() for t in result]
        graph.replay()
        assert_same(result, first)
        assert_same(first, step(head, x, y))


def test_a_graphed_head_learns_what_the_head_learns(gpu_backend):
    """Takes steps of an optimizer through torch.cuda.make_graphed_callables."""
    weights = []
    for graphed in (False, True):
        head, x, y = make(gpu_backend, margin=CurricularFace())
        call = head
        if graphed:
            state = {name: t.clone() for name, t in head.state_dict().items()}
            call = torch.cuda.make_graphed_callables(head, (x, y))
            head.load_state_dict(state)  # its warm-up moves what a margin remembers
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for seed in range(3):
            draw(x, y, seed)
            optimizer.zero_grad()
            call(x, y).backward()
            optimizer.step()
        weights.append([head.weight.detach(), head.margin.t])
    assert_same(*weights)


def test_the_example_of_a_graph_learns_the_same(capsys):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    runpy.run_path(str(EXAMPLES / "cuda_graph.py"), run_name="__main__")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4


def test_each_replay_draws_another_sample(gpu_backend):
    head, x, y = make(gpu_backend)

    def sampled():
        loss = margin_cross_entropy(
            x, head.weight, y, margin=ArcFace(), scale=64.0, sampling=PartialFC(0.2),
            backend=gpu_backend,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, [x, head.weight])]

    graph, (loss, _, dw) = captured(sampled)
    taken = []
    for _ in range(2):
        graph.replay()
        assert loss.isfinite()
        taken.append(dw.abs().sum(1) > 0)
    assert all(used[y].all() and used.sum() <= 0.2 * C for used in taken)
    assert not torch.equal(*taken)


def test_a_head_that_draws_from_a_seed_is_not_captured(gpu_backend):
    head, x, y = make(gpu_backend, sampling=PartialFC(0.2))
    with pytest.raises(RuntimeError, match="expected no capture of a CUDA graph"):
        captured(lambda: step(head, x, y))
    assert torch.isfinite(step(head, x, y)[0])


def test_settings_that_forbid_fp32_products_change_nothing(gpu_backend):
    head, x, y = make(gpu_backend, compute_dtype=torch.float16)
    expected = step(head, x, y)
    matmul, tunable = torch.backends.cuda.matmul, torch.cuda.tunable
    tuning = tunable.tuning_is_enabled()
    matmul.allow_fp16_accumulation = True
    tunable.tuning_enable(False)
    tunable.enable(True)
    try:
        got = step(head, x, y)
        assert tunable.is_enabled() and matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False
        tunable.enable(False)
        tunable.tuning_enable(tuning)
    assert_same(got, expected)


@pytest.mark.parametrize("save_tiles", [False, True])
def test_peak_memory_of_a_step_is_its_gradients_and_what_the_documentation_says(
    gpu_backend, save_tiles
):
    classes = 3_000_000
    head, x, y = make(gpu_backend, classes=classes, save_tiles=save_tiles)
    step(head, x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step(head, x, y)
    beyond = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in gradients)
    logits, kept = 4 * N * classes, (2 * 1.02 * N * classes if save_tiles else 0)
    rounded = 2 * classes * D
    assert beyond < kept + rounded + logits / 3, f"{beyond / logits:.2f} of fp32 logits"


@pytest.mark.parametrize("wrong", [C, 10**9, -1, -(2**40)])
def test_a_label_out_of_range_has_a_loss_of_nan_and_a_gradient_of_zero(gpu_backend, wrong):
    head, x, y = make(gpu_backend, reduction="none")

    def solve(labels):
        loss = head(x, labels)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), [x, head.weight])]

    ignored, bad = y.clone(), y.clone()
    ignored[3], bad[3] = -100, wrong
    expected, got = solve(ignored), solve(bad)
    torch.cuda.synchronize()  # nothing was read or written out of bounds
    assert got[0][3].isnan() and (got[1][3] == 0).all()
    got[0][3] = expected[0][3]
    assert_same(got, expected)
