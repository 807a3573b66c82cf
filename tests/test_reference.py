# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that the number of blocks of classes of the reference changes nothing but memory."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marginkernels import ArcFace, CurricularFace, MagFace, NSoftmax, margin_cross_entropy
from marginkernels.backends import reference
from tests.support.problems import random_problem

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
OPTIONS = {
    "plain": dict(margin=ArcFace(0.3), scale=8.0),
    "transform": dict(margin=CurricularFace(0.4), scale=8.0),
    "norms": dict(margin=MagFace(0.1, 9.0, 0.2, 0.5), scale=8.0),
    "bias": dict(margin=NSoftmax(), scale=0.5, normalize="none", bias=True, label_smoothing=0.1),
    "weight": dict(margin=ArcFace(0.2), scale=0.5, normalize="weight", label_smoothing=0.1),
}


class Seen(TorchDispatchMode):
    """Notes the size of the largest tensor and the types of all, inside the ops too."""

    def __init__(self):
        super().__init__()
        self.largest, self.dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "marginkernels" and name.startswith("head_"):
            with self:
                return getattr(reference, name.removesuffix("_reference"))(*args, **kwargs)
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                self.dtypes.add(t.dtype)
        return made


def solve(problem, dtype=None):
    """Returns loss, statistics and all gradients, of the scale too."""
    leaves = [t if t is None else t.to(dtype or t.dtype) for t in (problem.x, problem.w)]
    settings = dict(copy.deepcopy(problem.settings), backend="reference", return_stats=True)
    if problem.bias is not None:
        leaves.append(problem.bias.to(leaves[0].dtype))
    leaves = [t.detach().requires_grad_() for t in leaves]
    scale = torch.tensor(settings.pop("scale"), dtype=leaves[0].dtype, device=leaves[0].device)
    scale.requires_grad_()
    bias = leaves[2] if problem.bias is not None else None
    loss, stats = margin_cross_entropy(
        *leaves[:2], problem.y, bias=bias, scale=scale, compute_dtype=problem.compute_dtype,
        reduction="sum", **settings,
    )  # fmt: skip
    return loss, *stats, *torch.autograd.grad(loss, [*leaves, scale])


@pytest.mark.parametrize("compute_dtype", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_tensor_has_all_logits(options, compute_dtype, device):
    n, c, d = 128, 20_000, 8
    problem = random_problem(n, c, d, device=device, **OPTIONS[options])
    problem.compute_dtype = compute_dtype
    with Seen() as seen:
        solve(problem)
    assert n * c > 2 * reference.BLOCK_NUMBERS
    assert seen.largest <= reference.BLOCK_NUMBERS


def test_rows_of_a_block_are_bounded_too(device):
    problem = random_problem(1, 3000, 1024, device=device, **OPTIONS["plain"])
    with Seen() as seen:
        solve(problem)
    assert seen.largest == problem.w.numel()  # its gradient


@pytest.mark.parametrize("options", OPTIONS)
def test_no_fp64_for_fp32_operands(options, device):
    """Serves devices that have no such type."""
    problem = random_problem(6, 20, 4, device=device, **OPTIONS[options])
    with Seen() as seen:
        solve(problem)
    assert F32 in seen.dtypes and F64 not in seen.dtypes


@pytest.mark.parametrize("n, c", [(0, 5), (7, 1), (7, 4), (7, 23)])
@pytest.mark.parametrize("options", OPTIONS)
def test_any_number_of_blocks_gives_the_same(options, n, c, device, monkeypatch):
    problem = random_problem(n, c, 6, device=device, **OPTIONS[options])
    if n:
        problem.y[0] = -100
    expected = solve(problem, F64)
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(reference, "BLOCK_CLASSES", 5)
    for a, b in zip(solve(problem, F64), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", ["plain", "norms", "bias", "weight"])
def test_gradcheck_over_blocks(options, device, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(reference, "BLOCK_CLASSES", 2)
    problem = random_problem(4, 7, 3, device=device, **OPTIONS[options])
    settings = dict(problem.settings, backend="reference", reduction="none")
    scale = torch.tensor(settings.pop("scale"), dtype=F64, device=device)
    leaves = [problem.x, problem.w, scale, *([] if problem.bias is None else [problem.bias])]

    def loss(x, w, scale, bias=None):
        return margin_cross_entropy(x, w, problem.y, scale=scale, bias=bias, **settings)

    assert torch.autograd.gradcheck(loss, [t.double().requires_grad_() for t in leaves])


def test_autocast_narrows_nothing_inside(device):
    problem = random_problem(7, 30, 8, device=device, **OPTIONS["bias"])
    problem.compute_dtype = F32
    expected = solve(problem)
    with torch.autocast(device, BF16):
        for a, b in zip(solve(problem), expected, strict=True):
            assert torch.equal(a, b)
