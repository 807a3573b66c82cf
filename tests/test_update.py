# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the step inside the backward sweep of each backend with its definition."""

import pytest
import torch

from marginkernels import ops
from marginkernels.backends import reasons
from marginkernels.numerics import least_norm
from marginkernels.rounding import philox, random_words, stochastically_rounded, stored
from tests.support.updates import (
    BF16,
    F64,
    FIRST_CLASS,
    Case,
    assert_as_expected,
    problem,
    skip_without_updates,
    take,
)

CASES = {
    "sgd": Case(),
    "sgd without momentum": Case(stateless=True, normalize_w=False),
    "adamw": Case("adamw", c=1, d=1),
    "rowwise_adagrad": Case("rowwise_adagrad", d=130),
    "bf16 state": Case(state_dtype=BF16, d=33),
    "bf16 weights": Case(w_dtype=BF16, state_dtype=BF16, compute_dtype=BF16, n=1),
    "bf16 compute": Case(compute_dtype=BF16, state_dtype=BF16, project=True, c=300),
    "adamw in bf16": Case("adamw", w_dtype=BF16, state_dtype=BF16, compute_dtype=BF16, d=70),
    "rowwise in bf16": Case("rowwise_adagrad", w_dtype=BF16, compute_dtype=BF16, sampled=True),
    "sampled": Case(sampled=True, state_dtype=BF16),
    "sampled adamw": Case("adamw", sampled=True, c=70, n=3),
    "projected": Case(project=True, w_dtype=BF16),
    "bounded": Case(max_row_norm=0.05, upstream=3.0),
    "unscaled": Case("adamw", unscale=2.0**-10, upstream=2.0**10),
    "unscaled and bounded": Case(
        "rowwise_adagrad", unscale=2.0**-10, upstream=2.0**10, max_row_norm=0.02
    ),
    "skipped": Case("adamw", skip=True, w_dtype=BF16, state_dtype=BF16),
    "skipped where nothing is finite": Case(
        "rowwise_adagrad", skip=True, upstream=torch.inf, sampled=True
    ),
    "several targets": Case(targets=3, sampled=True),
    "several targets in bf16": Case(targets=2, w_dtype=BF16, compute_dtype=BF16, n=70),
    "sub-centres": Case("adamw", sub_centers=3),
    "sub-centres in bf16": Case(
        sub_centers=5, targets=2, w_dtype=BF16, compute_dtype=BF16, sampled=True
    ),
    "one versus rest": Case("adamw", one_versus_rest=True, compute_dtype=BF16),
    "fp64": Case(w_dtype=F64, state_dtype=F64, compute_dtype=F64, project=True, max_row_norm=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_its_definition(name, backend, device):
    """Compares with the rule on the backend's own dw, which other tests judge."""
    skip_without_updates(backend)
    case = CASES[name]
    if why_not := reasons(backend, device, case.compute_dtype):
        pytest.skip("; ".join(why_not))
    p = problem(case, device)
    taken = take(backend, case, p)
    assert_as_expected(case, p, taken)
    if torch.tensor(case.upstream).isfinite():
        assert torch.equal(taken.dx, taken.plain_dx)  # that of the old weights


@pytest.mark.parametrize("name", ["sgd", "bf16 weights", "bf16 compute", "sampled", "skipped"])
def test_the_new_norms_are_those_of_the_new_rows(name, backend, device):
    skip_without_updates(backend)
    case = CASES[name]
    p = problem(case, device)
    taken = take(backend, case, p)
    rows = ops.rounded(taken.w if p.index is None else taken.w[p.index], case.compute_dtype)
    norms = rows.double().norm(dim=1).clamp_min(least_norm(case.compute_dtype))
    torch.testing.assert_close(taken.w_inv.double(), 1 / norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("d", [4, 37, 514])
def test_the_bits_of_the_rounding_are_the_same_everywhere(d, sampled, backend, device):
    """Decays the weights by a power of two, which fp32 holds exactly, so that all else is bits."""
    skip_without_updates(backend)
    case = Case(w_dtype=BF16, state_dtype=BF16, compute_dtype=BF16, d=d, upstream=0.0,
                sampled=sampled)  # fmt: skip
    p = problem(case, device)
    p.state[0].zero_()
    p.numbers[3:9] = torch.tensor([0.5, 2.0**-6, 0.0, 1.0, 1.0, 0.0])
    taken = take(backend, case, p)
    places = torch.arange(case.c, device=device) if p.index is None else p.index
    old, class_id = p.w[places].float(), places + FIRST_CLASS
    w = stored(old - 0.5 * (2.0**-6 * old), BF16, 0, p.random, class_id)
    momentum = stored(2.0**-6 * old, BF16, 1, p.random, class_id)
    assert torch.equal(taken.w[places], w)
    assert torch.equal(taken.state[0][places], momentum)
    assert (w != old - 2.0**-7 * old).any()  # something was rounded


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_the_generator_is_philox(counter, key, words):
    """Compares with the known answers of Random123, https://github.com/DEShawResearch/random123."""
    counter, key = (tuple(torch.tensor(word) for word in given) for given in (counter, key))
    assert tuple(int(word) for word in philox(counter, key)) == words


def test_rounding_has_no_bias_and_leaves_what_bf16_holds():
    values = torch.tensor([1.0, 1.001, -1.003, 3e-39, 2.5e-3, 0.0, -0.0, 1e38])
    words = [random_words(torch.tensor([3, step]), torch.arange(1), 8, 0) for step in range(4000)]
    draws = torch.stack([stochastically_rounded(values, w[0] & 0xFFFF) for w in words]).double()
    exact = values.double()
    spread = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * spread).all()
    assert (draws[:, 0] == 1).all() and (draws[:, 5:7] == 0).all()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    rounded = stochastically_rounded(special, torch.full((3,), 0xFFFF))
    assert rounded[0] == torch.inf and rounded[1] == -torch.inf and rounded[2].isnan()
