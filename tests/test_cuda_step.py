# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the step inside the backward sweep of the CUDA kernels, beside tests of every backend.

They cover the variants of the kernels, by fibers and as PTX, and what only these kernels have.
"""

import pytest
import torch
from torch import Tensor

from marginkernels import ops
from tests.emulation import host, simulate
from tests.support import updates
from tests.support.updates import BF16, F32, F64, Case, Taken

F16 = torch.float16
RULES = {
    "sgd": dict(stateless=True),  # a kernel of its own
    "momentum": dict(rule="sgd"),
    "adamw": dict(rule="adamw"),
    "rowwise_adagrad": dict(rule="rowwise_adagrad"),
}
TYPES = {  # compute, weights, state
    "fp32": (F32, F32, F32),
    "fp32, bf16 stored": (F32, BF16, BF16),
    "bf16": (BF16, F32, F32),
    "bf16 stored": (BF16, BF16, BF16),
    "fp16, bf16 state": (F16, F32, BF16),
    "fp64": (F64, F64, F64),
}
# rows of whole vectors and of odd length, in registers (up to 512 and 1024 numbers) and beyond
SHAPES = [(20, 150, 40), (5, 150, 37), (70, 200, 600), (9, 140, 1100)]
OPTIONS = [
    dict(normalize_w=False),
    dict(sampled=True, project=True),
    dict(max_row_norm=0.05, unscale=0.5),
]


def step_of(rule: str, types: str, shape: tuple[int, int, int], **options: bool | float) -> Case:
    """Describes a step of a rule in some types."""
    compute, w, state = TYPES[types]
    n, c, d = shape
    of_types = dict(compute_dtype=compute, w_dtype=w, state_dtype=state)
    return Case(n=n, c=c, d=d, **RULES[rule], **of_types, **options)


def taken(case: Case, *of_rule: float) -> Taken:
    """Takes a step; ``of_rule`` are other numbers of the rule."""
    torch.manual_seed(0)
    p = updates.problem(case, "cpu")
    p.numbers[3:][: len(of_rule)] = torch.tensor(of_rule)
    return updates.take(host.NAME, case, p)


@pytest.fixture
def executed():
    with host.executed():
        yield


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_variant_of_the_kernel_takes_the_step(rule, types, executed):
    turn = list(RULES).index(rule) + list(TYPES).index(types)
    for more in range(2):
        case = step_of(rule, types, SHAPES[(turn + more) % 4], **OPTIONS[(turn + more) % 3])
        p = updates.problem(case, "cpu")
        result = updates.take(host.NAME, case, p)
        updates.assert_as_expected(case, p, result)
        # of the old weights; a copy of w in another type changes the order of a sum
        precise = {F16: 2e-3, BF16: 1e-2}.get(case.compute_dtype, 1e-5)
        torch.testing.assert_close(result.dx, result.plain_dx, rtol=precise, atol=precise)


def test_rows_of_w_may_lie_apart_in_memory(executed):
    case = step_of("momentum", "fp32", SHAPES[0])
    p = updates.problem(case, "cpu")
    columns = p.w.t().contiguous().t()
    for w in (p.w, columns):
        torch.manual_seed(1)
        result = updates.take(host.NAME, case, p._replace(w=w))
        assert result.w.is_contiguous() is (w is p.w)
        updates.assert_as_expected(case, p, result)


@pytest.mark.parametrize("types", ["fp32", "bf16"])
def test_the_gradient_of_the_norm_moves_the_weights(types, executed):
    """Compares a step that only takes this gradient with head_bwd's dw of it."""
    case = step_of("sgd", types, SHAPES[0])
    p = updates.problem(case, "cpu")
    p.numbers[3:5] = torch.tensor([1.0, 0.0])
    w_norm = torch.randn(case.n) * (p.y >= 0)
    operands = (p.y, torch.tensor(8.0), None, None)
    lse, *_, x_inv, w_inv, tiles, _ = ops.head_fwd(host.NAME)(
        p.x, p.w, *operands, None, save_tiles=False, want_sum=False, want_max=False, **p.settings
    )
    results, nothing = (*operands, lse, x_inv, w_inv, tiles), torch.zeros(case.n)
    gradients, needs = (nothing, nothing, w_norm, None), dict(need_x=False, need_bias=False)
    needs["need_scale"] = False
    _, dw, *_ = ops.head_bwd(host.NAME)(
        p.x, p.w, *results, *gradients, need_w=True, **needs, **p.settings
    )
    w = p.w.clone()
    ops.head_step(host.NAME)(
        p.x, w, *results, *gradients, [], p.numbers, p.random, rule="sgd", project=False,
        first_class=0, **needs, **p.settings,
    )  # fmt: skip
    assert dw.any() and torch.equal(w, p.w - dw)


# fp32 has the new weights and states exactly: there is no gradient, and 2^-10 of a weight and 2^-9
# of a state in bf16, which has 8 bits, fit in any order
KEPT = 1 - 2**-9
EXACT = {
    "momentum": (1, 2**-10, KEPT, 0, 1, 0),
    "adamw": (1 - 2**-10, KEPT, KEPT, 1e-8, 0, 1),
}


@pytest.mark.parametrize(
    "rule, shape", [("momentum", SHAPES[3]), ("adamw", SHAPES[1])], ids=["momentum", "adamw"]
)
def test_fibers_and_ptx_round_to_the_bits_of_the_definition(rule, shape):
    case = step_of(rule, "bf16 stored", shape, upstream=0.0, sampled=True)
    by_fibers, by_ptx, _ = simulate.twice(lambda: taken(case, *EXACT[rule]))
    torch.manual_seed(0)
    p = updates.problem(case, "cpu")
    p.numbers[3:9] = torch.tensor(EXACT[rule])
    _, stored = updates.expected(case, p, torch.zeros(case.c, case.d))
    for got in (by_fibers, by_ptx):
        for new, bits in zip((got.w, *got.state), stored, strict=True):
            assert torch.equal(new[p.index].view(torch.int16), bits.view(torch.int16))
    moved = (by_ptx.w != p.w)[p.index].float().mean()
    assert 0.125 < moved < 0.25  # by an eighth to a quarter of a unit


@pytest.mark.parametrize(
    "rule, types, shape, options",
    [
        ("momentum", "bf16", (20, 150, 72), dict(project=True, max_row_norm=0.05)),
        ("rowwise_adagrad", "fp32, bf16 stored", (5, 70, 37), dict(sampled=True)),
        ("adamw", "fp32", (5, 50, 1100), dict(sampled=True)),
        ("sgd", "fp64", (5, 70, 36), dict(max_row_norm=0.05)),
        ("momentum", "fp32", (5, 70, 600), dict(skip=True)),
    ],
    ids=["registers", "odd rows", "memory", "fp64", "skipped"],
)
def test_ptx_agrees_with_the_fibers(rule, types, shape, options):
    case = step_of(rule, types, shape, **options)
    by_fibers, by_ptx, counters = simulate.twice(lambda: taken(case))
    torch.manual_seed(0)
    updates.assert_as_expected(case, updates.problem(case, "cpu"), by_ptx)
    for got, expected in zip(by_ptx, by_fibers, strict=True):
        precise = 1e-2 if BF16 in (case.w_dtype, case.compute_dtype) else 1e-5
        torch.testing.assert_close(got, expected, rtol=precise, atol=precise)
    assert any("update_kernel" in launch.symbol for launch, _ in counters)


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("types", TYPES)
def test_a_sweep_by_index_is_one_over_those_rows(types, shape, executed):
    case = step_of("sgd", types, shape, sampled=True)
    p = updates.problem(case, "cpu")
    assert p.index is not None
    scale = torch.tensor(8.0, dtype=p.numbers.dtype)
    up = [torch.rand(case.n, dtype=scale.dtype) * (p.y >= 0) for _ in range(3)]
    swept = []
    for w, index in ((p.w, p.index), (p.w[p.index], None)):
        operands = (p.x, w, p.y, scale, None, index)
        forward = ops.head_fwd(host.NAME)(
            *operands, None, save_tiles=False, want_sum=True, want_max=True, **p.settings
        )
        dx, dw, *others = ops.head_bwd(host.NAME)(
            *operands, forward[0], *forward[5:8], *up, None, need_x=True, need_w=True,
            need_bias=True, need_scale=True, **p.settings,
        )  # fmt: skip
        swept.append((*forward, dx, dw if index is None else dw[index], *others))
        if index is not None:
            dw[index] = 0
            assert dw.shape == w.shape and not dw.any()
    precise = {F16: 2e-3, BF16: 1e-2, F32: 1e-5}.get(case.compute_dtype, 1e-12)
    for got, expected in zip(*swept, strict=True):  # sums may be in another order
        torch.testing.assert_close(got, expected, rtol=precise, atol=precise)


@pytest.mark.parametrize("types", ["fp32", "bf16 stored"])
def test_known_norms_are_not_computed_again(types):
    case = step_of("sgd", types, (70, 200, 64))
    p = updates.problem(case, "cpu")

    def forward(known: Tensor | None) -> tuple[int, Tensor, Tensor]:
        del launches[:]
        results = ops.head_fwd(host.NAME)(
            p.x, p.w, p.y, torch.tensor(8.0), None, p.index, known, save_tiles=False,
            want_sum=False, want_max=False, **p.settings,
        )  # fmt: skip
        return sum("norm_kernel" in each.symbol for each in launches), results[0], results[6]

    with simulate.recorded() as launches:
        norms, lse, w_inv = forward(None)
        assert norms > 0
        again = forward(w_inv)
        assert again[0] < norms  # of x, where it needs no rounding
        assert torch.equal(again[1], lse) and torch.equal(again[2], w_inv)
        assert again[2].data_ptr() != w_inv.data_ptr()
        assert not torch.equal(forward(2 * w_inv)[1], lse)
        with pytest.raises(ValueError, match=r"known_w_inv: expected .* got \[3\]"):
            forward(w_inv[:3])
