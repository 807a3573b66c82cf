# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks bad labels and samples where values are not checked, as on a GPU."""

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from marginkernels import ArcFace, margin_cross_entropy
from marginkernels.sampling import ChosenBy

N, C, D = 9, 50, 12
WRONG = {2: C, 3: -5, 5: 2**40}  # labels, by row; row 6 is ignored


@contextlib.contextmanager
def values_unchecked() -> Iterator[None]:
    """Looks at no value of a tensor inside this context, as on a GPU."""
    with unittest.mock.patch("marginkernels.device_checks.checks_values", lambda _: False):
        yield


def solve(
    y: Tensor, x: Tensor, w: Tensor, leaves: tuple[Tensor, ...] = (), **settings: Any
) -> tuple[list[Tensor], Tensor]:
    """Returns losses and statistics of the rows, and gradients of the losses of the right rows."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    losses, stats = margin_cross_entropy(x, w, y, reduction="none", return_stats=True, **settings)
    right = torch.ones(len(losses), dtype=torch.bool, device=losses.device)
    right[list(WRONG)] = False
    gradients = torch.autograd.grad(losses[right].sum(), [x, w, *leaves])
    return [losses.detach(), *stats, *gradients], right


def problem(device: str = "cpu") -> tuple[Tensor, ...]:
    """Returns features, weights, labels of which some are wrong, and labels without those."""
    torch.manual_seed(0)
    x, w = torch.randn(N, D, device=device), torch.randn(C, D, device=device)
    y = torch.randint(0, C, (N,), device=device)
    y[6] = -100
    wrong, left_out = y.clone(), y.clone()
    for row, label in WRONG.items():
        wrong[row], left_out[row] = label, -100
    return x, w, wrong, left_out


def labels_out_of_range(
    normalize: str, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Checks that their rows are NaN, and all else is as if they were ignored."""
    x, w, wrong, left_out = problem(device)
    x, w = x.to(dtype), w.to(dtype)
    table = torch.nn.Parameter(torch.rand(C, device=device))
    scale = torch.tensor(4.0, device=device, requires_grad=True)
    settings = dict(margin=ArcFace(table), scale=scale, normalize=normalize, backend=backend)
    leaves = (table, scale)
    with values_unchecked():
        got, right = solve(wrong, x, w, leaves, **settings)
        expected, _ = solve(left_out, x, w, leaves, **settings)
        mean = margin_cross_entropy(x, w, wrong, **settings)
    assert mean.isnan() and got[0][~right].isnan().all() and got[3][~right].isnan().all()
    assert not got[2][~right].any() and not got[1][~right].any()
    got[0], got[3] = (t.nan_to_num(0.0) for t in (got[0], got[3]))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def choose(index: Any) -> Callable[[Tensor], Tensor]:
    """Returns a sampler that chooses the same classes at each call."""
    return lambda label: torch.as_tensor(index, device=label.device)


SAMPLES = {  # what a sampler returns for rows of the classes 3, 7, 7; words of the error
    "a class is missing": ([2, 3, 5, 9], ["sampling:", "class 7"]),
    "unsorted": ([7, 3, 5], ["sampling:", "sorted", "got 3"]),
    "repeated": ([3, 7, 7], ["sampling:", "without repetition", "got 7"]),
    "too large": ([3, 7, C], ["sampling:", f"[0, {C})", f"got {C}"]),
    "negative": ([-1, 3, 7], ["sampling:", f"[0, {C})", "got -1"]),
    "floats": ([3.0, 7.0], ["sampling:", "int64", "float32"]),
    "empty": (torch.empty(0, dtype=torch.int64), ["sampling:", f"1 to {C}", "(0,)"]),
    "2-d": ([[3, 7]], ["sampling:", "(1, 2)"]),
}


def sampled_call(index: Any, device: str = "cpu", logq: bool = False, **settings: Any) -> Tensor:
    """Returns the losses of three rows, of the classes 3, 7 and 7, over a sample."""
    x, w, *_ = problem(device)
    y = torch.tensor([3, 7, 7], device=device)
    settings = dict(margin=ArcFace(0.2), scale=8.0, reduction="none") | settings
    return margin_cross_entropy(x[:3], w, y, sampling=ChosenBy(choose(index), logq), **settings)


def samples_are_checked(case: str, backend: str, device: str = "cpu") -> None:
    """Checks the errors for type and shape everywhere, and for values on the CPU."""
    index, words = SAMPLES[case]
    typed = case in ("floats", "empty", "2-d")
    if typed or device == "cpu":
        with pytest.raises((TypeError, ValueError)) as refusal:
            sampled_call(index, device, backend=backend)
        assert all(word in str(refusal.value) for word in words), refusal.value
    if not typed:
        with values_unchecked():
            loss = sampled_call(index, device, backend=backend)
        assert loss.isnan().tolist() == [case != "a class is missing", True, True]
