# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Takes steps with the op ``head_step`` of a backend, and says what they have to give."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from marginkernels import backends, ops, rules
from marginkernels.numerics import least_norm
from marginkernels.rounding import stored

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# numbers of a rule, awkward ones: nothing is 0 or 1 that need not be
OF_RULE = {
    "sgd": (0.3, 0.01, 0.9, 0.8, 0.25, 0.75),
    "adamw": (0.98, 0.9, 0.99, 1e-3, 0.05, 0.7),
    "rowwise_adagrad": (0.2, 0.01, 1e-3),
}
FIRST_CLASS = 1_000_003  # of the rank
RANDOM = (0x1234_5678_9ABC_DEF, 7)  # seed and step


class Case(NamedTuple):
    """Describes a step; the defaults are the simplest one."""

    rule: str = "sgd"
    w_dtype: torch.dtype = F32
    state_dtype: torch.dtype = F32
    compute_dtype: torch.dtype = F32
    n: int = 21
    c: int = 150
    d: int = 36
    stateless: bool = False
    sampled: bool = False
    project: bool = False
    max_row_norm: float = torch.inf
    unscale: float = 1.0
    skip: bool = False
    normalize_w: bool = True
    upstream: float = 1.0  # factor of the gradients that arrive
    targets: int = 0  # of a row; 0: y is (N,)
    sub_centers: int = 1  # of which c is a multiple
    one_versus_rest: bool = False


class Problem(NamedTuple):
    """Holds the operands of a step."""

    x: Tensor
    w: Tensor
    y: Tensor
    index: Tensor | None
    state: list[Tensor]
    numbers: Tensor
    random: Tensor
    settings: dict[str, Any]


def skip_without_updates(backend: str) -> None:
    """Skips the test if the backend serves no optimizer."""
    if not backends.get(backend).updates:
        pytest.skip(f"the {backend} backend has no head_step")


def problem(case: Case, device: str) -> Problem:
    """Draws a problem; one class is a zero row, one has two rows of x, and one row has no class."""
    stats = ops.statistics_dtype(case.compute_dtype)
    rows = 3 * case.c if case.sampled else case.c
    x = torch.randn(case.n, case.d).to(case.compute_dtype)
    w = torch.randn(rows, case.d).to(case.w_dtype)
    index, k = None, case.sub_centers
    if case.sampled:
        classes = torch.randperm(rows // k)[: case.c // k].sort().values
        index = (classes[:, None] * k + torch.arange(k)).flatten()
    y = torch.randint(case.c, (case.n, case.targets) if case.targets else (case.n,))
    if case.n > 2:
        y[1], y[2] = y[0], -1
    if case.targets > 1:
        y[::3, 1] = y[::3, 0]  # a target may come twice
    w[(index if case.sampled else torch.arange(case.c))[case.c // 2]] = 0
    state = []
    for part in () if case.stateless else rules.RULES[case.rule].state:
        shape, dtype = (rows, 1 if part.per_row else case.d), case.state_dtype
        state.append(torch.rand(shape).to(stats if part.per_row else dtype))
    of_rule = OF_RULE[case.rule]
    numbers = [case.unscale, float(case.skip), case.max_row_norm, *of_rule]
    numbers += [0.0] * (rules.NUMBERS - len(numbers))
    settings = dict(
        normalize_x=True, normalize_w=case.normalize_w, compute_dtype=case.compute_dtype,
        transform="identity", row_parameter=None, constants=None, sub_centers=k,
    )  # fmt: skip
    if case.one_versus_rest:
        constants = torch.tensor([3, 0.2, 0.8, 0.6], dtype=stats, device=device)
        settings.update(transform="sphereface2", constants=constants)
    moved = (t if t is None else t.to(device) for t in (x, w, y, index))
    return Problem(
        *moved, [t.to(device) for t in state], torch.tensor(numbers, dtype=stats, device=device),
        torch.tensor(RANDOM, device=device), settings,
    )  # fmt: skip


class Taken(NamedTuple):
    """Holds what a step has made, and what head_bwd gives for the same problem."""

    w: Tensor
    state: list[Tensor]
    w_inv: Tensor
    dx: Tensor
    plain_dx: Tensor
    dw: Tensor  # (C, D) of the classes that are swept, in the statistics dtype


def take(backend: str, case: Case, p: Problem) -> Taken:
    """Sweeps forward and backward, and then backward with the step."""
    stats = ops.statistics_dtype(case.compute_dtype)
    scale = torch.tensor(8.0, dtype=stats, device=p.x.device)
    operands = (p.y, scale, None, p.index)
    lse, target_cosine, *_, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(
        p.x, p.w, *operands, save_tiles=False, want_sum=False, want_max=False, **p.settings
    )
    up = [case.upstream * torch.rand_like(lse), -case.upstream * torch.rand_like(target_cosine)]
    up[1] *= p.y >= 0
    needs = dict(need_x=True, need_bias=False, need_scale=False)
    # with the weights in the statistics dtype, so that dw is not rounded to theirs
    wide = p.w.to(stats)
    plain_dx, dw, _, _ = ops.head_bwd(backend)(
        p.x, wide, *operands, lse, x_inv, w_inv, tiles, *up, None, None, need_w=True, **needs,
        **p.settings,
    )  # fmt: skip
    w, state, inverse = p.w.clone(), [t.clone() for t in p.state], w_inv.clone()
    dx, _, _ = ops.head_step(backend)(
        p.x, w, *operands, lse, x_inv, inverse, tiles, *up, None, None, state, p.numbers, p.random,
        rule=case.rule, project=case.project, first_class=FIRST_CLASS, **needs, **p.settings,
    )  # fmt: skip
    dw = dw if p.index is None else dw[p.index]
    return Taken(w, state, inverse, dx, plain_dx, dw)


def expected(case: Case, p: Problem, dw: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns weights and states after a step on ``dw``, as fp64 numbers and as they are stored."""
    places = torch.arange(len(p.w), device=p.w.device) if p.index is None else p.index
    old = [t[places].double() for t in (p.w, *p.state)]
    new_w, new_state = rules.applied(case.rule, old[0], dw.double(), old[1:], p.numbers.double())
    if case.project:
        norm = new_w.norm(dim=1, keepdim=True)
        new_w = torch.where(norm < least_norm(case.compute_dtype), new_w, new_w / norm)
    exact = [new_w, *new_state]
    wide = [t.to(p.numbers.dtype) for t in exact]
    dtypes = [p.w.dtype, *(t.dtype for t in p.state)]
    class_id = places + FIRST_CLASS
    return exact, [
        stored(t, dtype, position, p.random, class_id)
        for position, (t, dtype) in enumerate(zip(wide, dtypes, strict=True))
    ]


def assert_as_expected(case: Case, p: Problem, taken: Taken) -> None:
    """Checks weights and states number by number, and that other rows are as they were."""
    places = torch.arange(len(p.w), device=p.w.device) if p.index is None else p.index
    exact, stored_ = expected(case, p, taken.dw)
    before, after = (p.w, *p.state), (taken.w, *taken.state)
    for old, new, wanted, as_stored in zip(before, after, exact, stored_, strict=True):
        others = torch.ones(len(old), dtype=torch.bool, device=old.device)
        others[places] = False
        assert torch.equal(old[others], new[others])
        if case.skip:
            assert torch.equal(old, new)
        elif new.dtype == BF16:
            # one of the two neighbours; the same as here unless fp32 is on another side of its bits
            wrong = new[places] != as_stored
            ulp = 2.0**-7 * wanted.abs() + 1e-30
            assert ((new[places].double() - wanted).abs() <= 1.01 * ulp).all()
            assert wrong.double().mean() <= 2e-3
        else:
            eps = torch.finfo(new.dtype).eps
            rows = wanted.norm(dim=1, keepdim=True) / wanted.shape[1] ** 0.5
            close = (new[places].double() - wanted).abs() <= 16 * eps * (wanted.abs() + rows + 1e-3)
            assert close.all()


def opcheck(backend: str, case: Case, device: str) -> None:
    """Checks schema, fake and dispatch of the op."""
    p = problem(case, device)
    lse, grad_lse, grad_target = (torch.rand(len(p.x), device=device) for _ in range(3))
    swept = p.w if p.index is None else p.w[p.index]
    # logits of other norms would overflow
    x_inv, w_inv = (1 / t.float().norm(dim=1).clamp_min(1e-12) for t in (p.x, swept))
    scale = torch.tensor(8.0, device=device)
    operands = (p.x, p.w, p.y, scale, None, p.index, lse, x_inv, w_inv, lse[:0])
    torch.library.opcheck(
        ops.head_step(backend),
        (*operands, grad_lse, grad_target, None, None, p.state, p.numbers, p.random),
        dict(
            need_x=True, need_bias=False, need_scale=True, rule=case.rule, project=False,
            first_class=0, **p.settings,
        ),
    )  # fmt: skip
