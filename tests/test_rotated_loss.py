# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the loss by one op of a backend against the loss in PyTorch, in fp64.

The results of a sweep are made up here, so that every kind of row is there: hard and easy ones,
cosines at and beyond the ends, ignored labels and labels that no rank holds.
"""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    NSoftmax,
    Rows,
    SphereFace,
    backends,
    loss,
    margin_cross_entropy,
    row_ops,
)
from marginkernels.batch import held
from marginkernels.margins.target import BRANCHES
from marginkernels.results import SweepResult
from marginkernels.rotation import Rotation, rotated
from marginkernels.settings import Settings
from marginkernels.testing import assert_within_budget
from marginkernels.transforms import IDENTITY
from tests.emulation import host, simulate
from tests.support.simulation import needs_triton, simulated

C, IGNORED = 50, 7
F32, F64 = torch.float32, torch.float64
MARGINS = {
    "NSoftmax": NSoftmax(),
    "CosFace": CosFace(0.4),
    "straight through": ArcFace(0.5, gradient="straight_through"),
    "combined": CombinedMargin(1.0, 0.3, 0.2),
    **{branch: ArcFace(0.6, branch=branch) for branch in BRANCHES},
}
WHAT = ("loss", "derivative by lse", "by cosine", "by scale", "row_loss", "correct")


class Swept:
    """Holds the results of a sweep over made-up rows, and their labels and weights."""

    def __init__(self, n: int, foreign: bool = False, dtype: torch.dtype = F32):
        c, lse = (torch.rand(n) * 2 - 1).to(dtype), (torch.randn(n) * 8 + 10).to(dtype)
        c[::11], c[1::11], c[2::11] = 1.0, -1.0, 1.0 + 1e-6  # rounding leaves [-1, 1]
        c[3::11], lse[3::11] = 0.9, -8.0  # losses down to 1e-10
        lse[4::11] = -torch.inf  # a row without negatives
        self.label, self.weight = torch.randint(C, (n,)), torch.rand(n).to(dtype)
        self.label[5::11] = IGNORED
        if foreign:
            self.label[6::11] = C
        here = held(self.label, 0, C, IGNORED) >= 0
        self.result = SweepResult(
            lse, torch.where(here, c, 0), torch.where(here, 1 + c.abs(), 0), lse[:0],
            lse.nan_to_num(neginf=-1) / 2,
        )  # fmt: skip


def in_pytorch(
    swept: Swept, margin: nn.Module, reduction: str, weight: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Computes all of WHAT by the path of every margin."""
    lse, c, w_norm, _, logit_max = (t.to(dtype).clone() for t in swept.result[:5])
    scale = torch.tensor(16.0, dtype=dtype)
    operands = [t.requires_grad_() for t in (lse, c, scale)]
    settings = Settings("both", reduction, IGNORED, 0.0, 0.0, 0.0, dtype, False, "reference")
    value, stats = loss.loss(
        SimpleNamespace(settings=settings, margin=margin, x=None, label=swept.label, num_classes=C),
        SimpleNamespace(
            sample_weight=weight,
            label=swept.label,
            labelled=lambda: swept.label != IGNORED,
            has_label=lambda: swept.label != IGNORED,
            over_labels=lambda losses: losses,
            pairs=lambda w_norm, scale: Rows(swept.label, w_norm, w_norm, None),
        ),
        SweepResult(lse, c, w_norm, lse[:0], logit_max), scale, IDENTITY, True,
    )  # fmt: skip
    slopes = torch.autograd.grad(value.sum(), operands)
    return [value.detach(), *slopes, stats.row_loss, stats.correct]


def by_op(
    backend: str, swept: Swept, margin: nn.Module, reduction: str, weight: Tensor | None
) -> list[Tensor]:
    """Computes all of WHAT by the op."""
    r, scale = swept.result, torch.tensor(16.0, dtype=swept.weight.dtype)
    value, slopes, row_loss, correct = row_ops.head_loss(backend)(
        r.lse, r.target_cosine, r.w_norm, swept.label, scale, weight, r.logit_max,
        ignore_index=IGNORED, reduction=reduction, rotation=margin.rotation(), need_scale=True,
    )  # fmt: skip
    return [value, slopes[0], slopes[1], slopes[2].sum(), row_loss, correct]


def check(
    backend: str, n: int, name: str, reduction: str, weighted: bool, foreign: bool,
    dtype: torch.dtype = F32,
) -> None:  # fmt: skip
    """Judges the op by the PyTorch path: errors of at most twice those of its own in the type."""
    swept, margin = Swept(n, foreign, dtype), MARGINS[name]
    weight = swept.weight if weighted else None
    got = by_op(backend, swept, margin, reduction, weight)
    plain = in_pytorch(swept, margin, reduction, weight, dtype)
    exact = in_pytorch(swept, margin, reduction, weight, F64)
    for what, ours, theirs, true in zip(WHAT, got, plain, exact, strict=True):
        assert ours.shape == true.shape and ours.dtype == theirs.dtype
        if what == "correct":
            assert torch.equal(ours, theirs)
            continue
        assert torch.equal(ours.isnan(), true.isnan())
        ours, theirs, true = (t.nan_to_num().reshape(-1) for t in (ours, theirs, true))
        # scale t - lse is a difference of numbers up to 30, and a slope one of numbers near 1;
        # fp64 is its own judge, so that the errors of both count
        assert_within_budget(
            f"{name}: {what}", ours, [theirs], true, conditioning=64.0 if dtype == F32 else 512.0
        )


OPTIONS = [("mean", False, False), ("mean", True, True), ("sum", True, False), ("none", True, True)]


@pytest.mark.parametrize("n", [0, 1, 1000, 4097])
@pytest.mark.parametrize("name", MARGINS)
def test_the_extension_agrees_with_pytorch(name, n):
    if not backends.reasons("native", "cpu"):
        for options in OPTIONS:
            check("native", n, name, *options)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", MARGINS)
def test_cuda_on_fibers_agrees_with_pytorch(name, dtype, poisoned):
    with host.executed():
        for n, options in zip((1000, 1, 0, 600), OPTIONS, strict=True):
            check(host.NAME, n, name, *options, dtype)


def test_ptx_of_cuda_agrees_with_the_fibers():
    def solve():
        torch.manual_seed(0)
        swept = Swept(600, foreign=True)
        return by_op(host.NAME, swept, MARGINS["hard"], "none", swept.weight)

    by_fibers, by_ptx, counters = simulate.twice(solve)
    torch.testing.assert_close(by_fibers, by_ptx, rtol=1e-5, atol=1e-9, equal_nan=True)
    assert len(counters) == 1


@needs_triton
@pytest.mark.parametrize("simulator", ["ttsem", "ptxsim"])
@pytest.mark.parametrize("name", ["CosFace", "hard", "monotone"])
def test_triton_agrees_with_pytorch(name, simulator, poisoned):
    with simulated(simulator):
        for n, options in zip((1100, 1, 0, 40), OPTIONS, strict=True):
            check("triton", n, name, *options)


@needs_triton
@pytest.mark.parametrize("name", ["native", host.NAME, "triton"])
def test_labels_become_places_among_the_classes_held(name, poisoned):
    y = torch.tensor([0, 9, 10, 12, 19, 20, -100, -1, 2**40] * 300)[::2]
    runs = {"triton": partial(simulated, "ttsem"), host.NAME: host.executed}
    with runs.get(name, contextlib.nullcontext)():
        if why_not := backends.reasons(name, "cpu"):
            pytest.skip("; ".join(why_not))
        for ignored in (12, -100):
            places = row_ops.head_held(name)(y, first=10, count=10, ignore_index=ignored)
            assert torch.equal(places, held(y, 10, 10, ignored))
    assert held(y[:5], 10, 10, 12).tolist() == [-1, 0, 9, -1, -1]


@needs_triton
@pytest.mark.parametrize("name", ["native", host.NAME, "triton"])
def test_a_row_without_a_class_has_no_derivatives_whatever_its_weight(name, poisoned):
    swept = Swept(40, foreign=True)
    foreign = swept.label == C
    weight = torch.where(foreign, torch.nan, 1.0)
    runs = {"triton": partial(simulated, "ttsem"), host.NAME: host.executed}
    with runs.get(name, contextlib.nullcontext)():
        if why_not := backends.reasons(name, "cpu"):
            pytest.skip("; ".join(why_not))
        loss_of_rows, *slopes, _, _, _ = by_op(name, swept, MARGINS["hard"], "none", weight)
    assert loss_of_rows[foreign].isnan().all()
    assert all(slope.isfinite().all() and not slope[foreign].any() for slope in slopes)


@pytest.mark.parametrize("name", MARGINS)
def test_a_rotation_is_the_margin(name):
    c = torch.cat([torch.linspace(-1, 1, 1001, dtype=F64), torch.tensor([-1 - 1e-7, 1 + 1e-7])])
    c.requires_grad_()
    t, slope = rotated(c, MARGINS[name].rotation())
    expected = MARGINS[name](c, Rows(c.long(), c, c, None))
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), c)[0])


def test_a_margin_that_is_more_than_its_base_is_no_rotation():
    class Halved(ArcFace):
        def target(self, c: Tensor, m: Tensor) -> Tensor:
            return super().target(c, m) / 2

    class Renamed(ArcFace):
        pass

    class Halving:
        target = Halved.target

    class Mixed(Halving, Renamed):
        pass

    class Declared(Mixed):
        def rotation(self):
            return Rotation(less=0.1)

    assert Halved().rotation() is Mixed().rotation() is None
    assert Renamed().rotation() == ArcFace().rotation()
    assert Declared().rotation() == Rotation(less=0.1)
    assert ArcFace(torch.tensor(0.5)).rotation() is None and SphereFace().rotation() is None


@pytest.mark.parametrize("name", ["forward", "target", "of_rows", "with_gradient", "regularizer"])
def test_a_method_put_in_an_object_is_called(name):
    x, w, y, called = torch.randn(8, 16), torch.randn(50, 16), torch.arange(8), []
    margin = ArcFace()

    def method(*args):
        called.append(name)
        return getattr(type(margin), name)(margin, *args)

    setattr(margin, name, method)
    margin_cross_entropy(x, w, y, margin=margin, scale=64.0)
    assert called == [name]


@pytest.mark.parametrize("function", [torch.sqrt, torch.log])
def test_a_row_that_is_ignored_gives_no_gradient_through_any_function(function):
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y = torch.arange(8)
    gradients = []
    for rows in (slice(0, 8), slice(1, 8)):
        loss_of_rows = margin_cross_entropy(
            x[rows], w, y[rows], margin=ArcFace(), scale=8.0, reduction="none", ignore_index=0
        )
        gradients.append(torch.autograd.grad(function(loss_of_rows).sum(), (x, w)))
    torch.testing.assert_close(*gradients)


class Launches(TorchDispatchMode):
    """Lists the ops on numbers that a GPU would launch kernels for."""

    VIEWS = ("detach", "unbind", "expand", "view", "empty", "scalar_tensor", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.split(".")[0]
        if not name.startswith(self.VIEWS):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("margin", [ArcFace(0.5), CosFace(0.4), CombinedMargin(m3=0.1)])
def test_six_launches_around_the_sweeps(margin, monkeypatch):
    """Counts those of a GPU, where no values are checked: 3 forward and 3 backward."""
    if backends.reasons("native", "cpu"):
        pytest.skip("no extension")
    monkeypatch.setattr("marginkernels.device_checks.checks_values", lambda _: False)
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y = torch.arange(8)
    with Launches() as forward:
        value = margin_cross_entropy(x, w, y, margin=margin, scale=64.0, backend="native")
    with Launches() as backward:
        value.backward()
    sweeps = [name for name in forward.names + backward.names if name.startswith("head_")]
    assert sweeps == ["head_held_native", "head_fwd_native", "head_loss_native", "head_bwd_native"]
    assert forward.names == ["head_held_native", "full", "head_fwd_native", "head_loss_native"]
    assert backward.names == ["ones_like", "mul", "div", "head_bwd_native"]
