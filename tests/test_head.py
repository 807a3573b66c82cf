# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests every backend against fp64, within the error budget of the plain PyTorch path."""

import pytest
import torch

from marginkernels import ArcFace, CosFace, NSoftmax, backends, margin_cross_entropy
from marginkernels.testing import plain_margin_cross_entropy
from tests.support import hard_cases
from tests.support.backends import skip_without_tiles
from tests.support.problems import MarginOfNorms, random_problem

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# one shape per regime of the kernels: a single number; one row; one class (no negatives); fewer
# classes than a block and odd D; several blocks with a ragged last one and D across a K block (500,
# 513); many rows; large D
SHAPES = [
    (1, 1, 1),
    (1, 300, 31),
    (5, 1, 16),
    (17, 7, 31),
    (33, 1025, 500),
    (70, 300, 513),
    (300, 700, 64),
    (9, 257, 1024),
    (4, 33, 5001),
]
# x, w, compute: the pure types, and 16-bit compute on fp32 masters
DTYPES = [
    (F32, F32, None),
    (BF16, BF16, None),
    (F16, F16, None),
    (F32, F32, BF16),
    (BF16, F32, None),
    (F32, F32, F16),
]


def ids(values):
    return ["-".join(str(v).removeprefix("torch.") for v in value) for value in values]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", ["both", "weight", "none"])
def test_the_judge_is_the_plain_head_in_fp64(normalize, bias, label_smoothing, reduction, device):
    scale, row_margin, weight = torch.tensor(0.7), torch.rand(23), torch.rand(23)
    settings = dict(margin=MarginOfNorms(), scale=scale.to(device), normalize=normalize)
    problem = random_problem(23, 41, 6, device=device, bias=bias, **settings)
    problem.settings |= dict(label_smoothing=label_smoothing, row_margin=row_margin.to(device))
    problem.settings |= dict(sample_weight=weight.to(device), reduction=reduction)
    problem.y[::5] = -100
    ours = problem.solve(margin_cross_entropy, torch.float64, backend="reference")
    plain = problem.solve(plain_margin_cross_entropy, torch.float64)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))
def test_backends_match_fp64(shape, dtypes, backend, device, poisoned):
    problem = random_problem(*shape, device=device, dtypes=dtypes, margin=ArcFace(0.3), scale=32.0)
    exact, plain = problem.solve_exact(), problem.solve_plain()
    problem.check(backend, exact, plain, save_tiles=False)
    if backends.get(backend).keeps_tiles and F16 not in (problem.x.dtype, problem.compute_dtype):
        problem.check(backend, exact, plain, save_tiles=True)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]], ids=ids([DTYPES[0], DTYPES[3]]))
@pytest.mark.parametrize("margin", [NSoftmax(), ArcFace(0.3)], ids=["identity", "arcface"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("normalize", ["both", "weight", "none"])
def test_normalize_modes_bias_and_smoothing(
    normalize, bias, margin, dtypes, backend, device, poisoned
):
    scale = {"both": 16.0, "weight": 2.0, "none": 0.2}[normalize]
    settings = dict(margin=margin, scale=scale, normalize=normalize)
    # D across a K block: the target's dot product and the bias are added once, not once per block
    problem = random_problem(37, 301, 530, device=device, dtypes=dtypes, bias=bias, **settings)
    problem.check(backend)
    problem.settings["label_smoothing"] = 0.1
    problem.check(backend)


@pytest.mark.parametrize("normalize", ["both", "none"])
def test_gradients_flow_through_the_norms(normalize, backend, device):
    hard_cases.gradients_through_the_norms(normalize, backend, device)


@pytest.mark.parametrize("save_tiles", [False, True])
@pytest.mark.parametrize("compute_dtype", [F32, BF16])
def test_same_bits_twice_and_with_other_threads(compute_dtype, save_tiles, backend, device):
    if save_tiles:
        skip_without_tiles(backend)
    problem = random_problem(65, 4100, 96, device=device, margin=ArcFace(0.5), scale=64.0)
    problem.compute_dtype = compute_dtype
    first = problem.solve_fused(backend, save_tiles=save_tiles)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if backend == "native" else threads)
        second = problem.solve_fused(backend, save_tiles=save_tiles)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_non_contiguous_operands(backend, device):
    problem = random_problem(20, 150, 40, device=device, margin=CosFace(0.2), scale=20.0)
    expected = problem.solve_fused(backend)
    layouts = {
        "transposed": lambda t: t.t().contiguous().t(),
        "row stride": lambda t: torch.cat([t, t.new_full((len(t), 3), torch.nan)], 1)[:, :-3],
        "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    }
    y = problem.y.repeat_interleave(2)[::2]
    for name, layout in layouts.items():
        other = type(problem)(layout(problem.x), layout(problem.w), y, settings=problem.settings)
        assert not other.w.is_contiguous()
        for a, b in zip(expected, other.solve_fused(backend), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_learnable_scale_and_bias_gradients(backend, device):
    hard_cases.learnable_scale_and_bias(backend, device)
