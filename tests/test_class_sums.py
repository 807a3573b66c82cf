# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests which pairs the sweeps of each backend sum over, and how: the ops against fp64.

The pairs that take no part are those of several targets in a row, and of centres that another of
their class exceeds. The sums are softmax's, and those of one-versus-rest losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from marginkernels import ops
from marginkernels.testing import assert_within_budget
from marginkernels.transforms import TRANSFORMS
from tests.support.backends import skip_without_tiles

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Case(NamedTuple):
    sub_centers: int = 1
    targets: int = 1  # of a row; 0: y is (N,)
    transform: str = "identity"
    n: int = 70
    classes: int = 97
    d: int = 40
    compute_dtype: torch.dtype = F32
    normalize: str = "both"
    extras: bool = False  # bias, sum, maximum, and gradients of bias and scale
    indexed: bool = False  # a sample of the classes

    def __str__(self) -> str:
        return "-".join(str(v).removeprefix("torch.") for v in self)


CASES = [
    Case(targets=0),
    Case(targets=3),
    Case(targets=3, compute_dtype=BF16),
    Case(targets=9, n=130, classes=300, compute_dtype=BF16),
    Case(targets=10, n=3, classes=1200, compute_dtype=BF16),  # most tiles have few targets
    Case(targets=2, compute_dtype=F16, n=1, classes=5),
    Case(targets=3, extras=True, normalize="none"),
    Case(targets=3, extras=True, compute_dtype=BF16, indexed=True),
    Case(targets=2, transform="curricular", compute_dtype=BF16),
    Case(sub_centers=3),
    Case(sub_centers=3, compute_dtype=BF16, n=130, classes=151, d=72),
    Case(sub_centers=2, compute_dtype=F16, n=1, classes=3, d=7),
    Case(sub_centers=5, compute_dtype=BF16, classes=131, extras=True),
    Case(sub_centers=3, extras=True, normalize="weight", indexed=True),
    Case(sub_centers=4, extras=True, normalize="none", compute_dtype=BF16),
    Case(sub_centers=3, transform="hardest", compute_dtype=BF16),
    Case(sub_centers=3, transform="curricular"),
    Case(sub_centers=3, targets=2, compute_dtype=BF16, indexed=True),
    Case(transform="sphereface2", compute_dtype=BF16),
    Case(transform="sphereface2", classes=1, n=3),
    Case(transform="sphereface2", compute_dtype=F16, extras=True),
    Case(transform="sphereface2", sub_centers=3, targets=2, compute_dtype=BF16, extras=True),
    Case(transform="sphereface2", extras=True, indexed=True),
]
CONSTANTS = {
    "curricular": [0.3],
    "hardest": [0.98, 0.2],
    "sphereface2": [3.0, -0.2, 0.98, 0.2],
}


class Problem(NamedTuple):
    operands: tuple[Tensor | None, ...]  # x, w, y, scale, bias, index
    settings: dict[str, Any]
    upstream: tuple[Tensor | None, ...]  # grad_lse, grad_target, grad_w_norm, grad_sum


def problem(case: Case, device: str) -> Problem:
    """Draws operands that the compute type holds, so that a case has one answer."""
    n, d, k = case.n, case.d, case.sub_centers
    stored = case.classes + 20 if case.indexed else case.classes
    x, w = torch.randn(n, d), torch.randn(stored * k, d)
    index = None
    if case.indexed:
        chosen = torch.randperm(stored)[: case.classes].sort().values
        index = (chosen[:, None] * k + torch.arange(k)).flatten()
    y = torch.randint(-1, case.classes, (n, max(case.targets, 1)))
    y = torch.where(y >= 0, y * k + torch.randint(0, k, y.shape), -1)
    if case.targets > 1:
        y[::3, 1] = y[::3, 0]  # a target may come twice
    if case.targets == 0:
        y = y[:, 0]
    w[-1] = 0
    one_versus_rest = TRANSFORMS[case.transform].one_versus_rest
    with_bias = case.extras and case.transform == "identity"
    bias = torch.randn(case.classes * k) if with_bias else None
    with_sum = case.extras and not one_versus_rest
    upstream = (
        torch.rand(n), torch.randn(y.shape), torch.randn(y.shape) if case.extras else None,
        # as small as label smoothing has it: the terms of dscale would cancel
        torch.randn(n) / case.classes if with_sum else None,
    )  # fmt: skip
    per_row = TRANSFORMS[case.transform].per_row
    numbers = CONSTANTS.get(case.transform)
    scale = torch.tensor(12.0 if case.normalize == "both" else 0.7)
    operands = (
        x.to(case.compute_dtype), w.to(case.compute_dtype), y, scale, bias, index
    )  # fmt: skip
    settings = dict(
        normalize_x=case.normalize == "both", normalize_w=case.normalize != "none",
        transform=case.transform, sub_centers=k,
        row_parameter=torch.rand(n) * 0.2 if per_row else None,
        constants=None if numbers is None else torch.tensor(numbers),
    )  # fmt: skip
    return Problem(*mapped(lambda t: t.to(device), (operands, settings, upstream)))


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to all tensors inside dictionaries and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(function, v) for name, v in value.items()}
    return tuple(mapped(function, v) for v in value) if isinstance(value, tuple) else value


def widened(given: Problem) -> Problem:
    return Problem(*mapped(lambda t: t.double() if t.is_floating_point() else t, tuple(given)))


NAMES = ("lse", "target_cosine", "w_norm", "logit_sum", "logit_max", "dx", "dw", "dbias", "dscale")


def computed(
    case: Case, given: Problem, backend: str, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Runs both ops, and returns their results by name."""
    settings = given.settings | dict(compute_dtype=compute_dtype)
    binary = TRANSFORMS[case.transform].one_versus_rest
    out = ops.Forward(
        *ops.head_fwd(backend)(
            *given.operands, save_tiles=False, want_sum=case.extras or binary,
            want_max=case.extras, **settings,
        )
    )  # fmt: skip
    gradients = ops.head_bwd(backend)(
        *given.operands, out.lse, out.x_inv, out.w_inv, out.tiles, *given.upstream,
        need_x=True, need_w=True, need_bias=given.operands[4] is not None,
        need_scale=case.extras, **settings,
    )  # fmt: skip
    return dict(zip(NAMES, (*out[:5], *gradients), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sweeps_agree_with_fp64(case, backend, device):
    given = problem(case, device)
    got = computed(case, given, backend, case.compute_dtype)
    exact = computed(case, widened(given), "reference", F64)
    plain = computed(case, given, "reference", case.compute_dtype)
    for name in NAMES:
        assert got[name].shape == exact[name].shape, name
        if not exact[name].isfinite().all():  # rows without negatives
            assert torch.equal(got[name].isneginf(), exact[name].isneginf()), name
            continue
        if exact[name].numel():
            # G is rounded to the compute type before it is multiplied
            steps = 4 if name in ("dx", "dw") else 30
            narrow = torch.finfo(case.compute_dtype).eps / torch.finfo(F32).eps
            slack = steps * (narrow if name in ("dx", "dw") else 1)
            one = got[name].reshape(1, -1)  # entries may cancel: the whole is judged
            assert_within_budget(
                name, one, [plain[name].reshape(1, -1)], exact[name].reshape(1, -1),
                slack * torch.finfo(F32).eps / torch.finfo(one.dtype).eps,
            )  # fmt: skip


@pytest.mark.parametrize(
    "case", [Case(targets=2), Case(sub_centers=3), Case(transform="sphereface2")]
)
def test_exponentials_are_kept_for_no_other_sum(case, backend, device):
    skip_without_tiles(backend)
    case = case._replace(compute_dtype=BF16)
    given = problem(case, device)
    with pytest.raises(ValueError, match="save_tiles: "):
        ops.head_fwd(backend)(
            *given.operands, save_tiles=True, want_sum=False, want_max=False,
            compute_dtype=BF16, **given.settings,
        )  # fmt: skip


@pytest.mark.parametrize("case", [Case(sub_centers=3), Case(sub_centers=4, compute_dtype=BF16)])
def test_equal_centres_leave_the_gradient_to_the_first(case, backend, device):
    given = problem(case, device)
    x, w, *others = given.operands
    k = case.sub_centers
    w[:] = w.reshape(-1, k, case.d)[:, :1].expand(-1, k, -1).reshape_as(w)
    y = others[0].clone()
    others[0] = torch.full_like(y, -1)
    got = computed(case, given._replace(operands=(x, w, *others)), backend, case.compute_dtype)
    dw = got["dw"].reshape(-1, k, case.d)
    assert dw[:-1, 0].abs().sum(1).min() > 0 and dw[:, 1:].abs().max() == 0


def test_one_versus_rest_neither_overflows_nor_vanishes(backend, device):
    case = Case(transform="sphereface2", n=4, classes=300)
    for scale in (1e-3, 64.0, 1e4):
        given = problem(case, device)
        x, w, y, s, *others = given.operands
        given = given._replace(operands=(x, w, y, torch.full_like(s, scale), *others))
        got = computed(case, given, backend, F32)
        exact = computed(case, widened(given), "reference", F64)
        for name in ("lse", "logit_sum", "dx", "dw"):
            assert got[name].isfinite().all()
            error = (got[name].double() - exact[name]).norm()
            # a logit has an error of its own size in units in the last place
            assert error <= (3e-6 + 3e-7 * scale) * exact[name].norm(), (name, scale)


def test_small_probabilities_add_up_one_versus_rest(backend, device):
    """Sums many terms of which 1 + exp(z) would lose every one."""
    n, c, d = 3, 4000, 8
    x = torch.zeros(n, d, device=device)
    x[:, 0] = 1
    w = -x[:1].expand(c, d).contiguous()
    y = torch.full((n,), -1, device=device)
    operands = (x, w, y, torch.tensor(20.0, device=device), None, None)
    settings = dict(
        normalize_x=True, normalize_w=True, transform="sphereface2", row_parameter=None,
        constants=torch.tensor([1.0, 0.0, 1.0, 0.0], device=device), compute_dtype=F32,
        save_tiles=False, want_sum=True, want_max=False,
    )  # fmt: skip
    lse, _, _, logit_sum, *_ = ops.head_fwd(backend)(*operands, **settings)
    expected = c * torch.tensor(-20.0, dtype=F64).exp()
    for total in (lse, logit_sum):
        torch.testing.assert_close(
            total.double().cpu(), expected.expand(n), rtol=1e-5, atol=0
        )  # fmt: skip
