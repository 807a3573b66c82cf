# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the step of the Triton backend, and sweeps over an index, by simulators.

``pytest --simulate ttsem -k triton tests/test_update.py`` has more cases.
"""

import pytest
import torch

from marginkernels import ops
from marginkernels.rounding import stored
from tests.support.simulation import mutated, needs_triton, simulated
from tests.support.updates import (
    BF16,
    F32,
    FIRST_CLASS,
    Case,
    Problem,
    assert_as_expected,
    problem,
    take,
)

# ragged rows and tiles, wide and narrow accesses, many rows in a program and one of eight warps
CASES = {
    "sgd": Case(d=72, c=70),
    "sgd without momentum, one feature": Case(stateless=True, d=1),
    "adamw in bf16, sampled": Case(
        "adamw", w_dtype=BF16, state_dtype=BF16, compute_dtype=BF16, d=31, sampled=True
    ),
    "rowwise adagrad, projected and bounded": Case(
        "rowwise_adagrad", compute_dtype=BF16, d=513, c=70, project=True, max_row_norm=0.05
    ),
    "a row of eight warps": Case(w_dtype=BF16, state_dtype=BF16, d=2100, c=9, n=3),
    "skipped": Case("adamw", w_dtype=BF16, skip=True, d=40, c=70),
}


def assert_the_step_is_its_definition(case):
    p = problem(case, "cpu")
    taken = take("triton", case, p)
    assert_as_expected(case, p, taken)
    assert torch.equal(taken.dx, taken.plain_dx)  # that of the old weights


@pytest.mark.parametrize("name", CASES)
def test_ttsem_takes_the_step_of_the_definition(name, poisoned):
    with simulated("ttsem"):
        assert_the_step_is_its_definition(CASES[name])


def test_ptx_takes_the_step_of_the_definition(poisoned):
    case = CASES["adamw in bf16, sampled"]._replace(c=40, d=40, project=True)
    with simulated("ptxsim"):
        assert_the_step_is_its_definition(case)


def assert_the_bits_of_the_rounding(d):
    """Decays the weights by a power of two, which fp32 holds exactly, and moves bf16 by bits alone.

    AdamW's second state halves; its weights only decay.
    """
    case = Case("adamw", w_dtype=BF16, state_dtype=BF16, compute_dtype=BF16, d=d, n=3,
                upstream=0.0, sampled=True)  # fmt: skip
    p = problem(case, "cpu")
    decay = 1 - 2.0**-7
    p.numbers[3:9] = torch.tensor([decay, decay, decay, 1.0, 0.0, 1.0])
    taken = take("triton", case, p)
    class_id = p.index + FIRST_CLASS
    tensors = zip((p.w, *p.state), (taken.w, *taken.state), strict=True)
    for position, (old, new) in enumerate(tensors):
        exact = old[p.index].float() * decay
        wanted = stored(exact, BF16, position, p.random, class_id)
        assert (exact != wanted).any()
        assert torch.equal(new[p.index], wanted), f"tensor {position}"


@pytest.mark.parametrize("d", [1, 260])
def test_rounds_with_the_bits_of_the_definition(d):
    with simulated("ttsem"):
        assert_the_bits_of_the_rounding(d)


def test_the_bits_of_the_rounding_do_not_depend_on_chunks(monkeypatch):
    from marginkernels.backends.triton import operands

    monkeypatch.setattr(operands, "CHUNK_BYTES", 1)
    with simulated("ttsem"):
        assert_the_bits_of_the_rounding(37)


def test_ptx_rounds_with_the_same_bits():
    with simulated("ptxsim"):
        assert_the_bits_of_the_rounding(36)


FAULTS = {
    "halves of the words swapped": ("w_new, words, 0,", "w_new, words, 16,"),
    "words out of order": ("(tl.interleave(a, c), ", "(tl.interleave(a, d), "),
    "the place for the class": ("(place + first_class).to", "(place + 0).to"),
    "the first stream again": ("(random, class_id, 1,", "(random, class_id, 0,"),
    "one round more": ("(rounding.PHILOX_ROUNDS)", "(rounding.PHILOX_ROUNDS + 1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@needs_triton
def test_a_fault_of_the_rounding_is_seen(fault, tmp_path, monkeypatch):
    from marginkernels.backends.triton import step, update

    mutant = mutated(update, *FAULTS[fault], tmp_path)
    monkeypatch.setattr(step, "update_kernel", mutant.update_kernel)
    with simulated("ttsem"), pytest.raises(AssertionError, match="tensor"):
        assert_the_bits_of_the_rounding(37)


def swept(p: Problem, w, index, known=None, extra=1.0):
    """Returns what both sweeps give, with a bias and with the gradient of the scale."""
    scale, bias = torch.tensor(8.0), torch.linspace(-1, 1, 40)
    operands = (p.y, scale, bias, index)
    forward = ops.head_fwd("triton")(
        p.x, w, *operands, known, save_tiles=False, want_sum=True, want_max=True, **p.settings
    )
    lse, *_, x_inv, w_inv, tiles, _ = forward
    ones = torch.ones_like(lse)
    return forward, ops.head_bwd("triton")(
        p.x, w, *operands, lse, x_inv, w_inv, tiles, ones, -ones * (p.y >= 0), ones, extra * ones,
        need_x=True, need_w=True, need_bias=True, need_scale=True, **p.settings,
    )  # fmt: skip


@pytest.mark.parametrize("w_dtype, d", [(BF16, 64), (F32, 50)])
def test_rows_by_index_are_swept_as_if_they_were_gathered(w_dtype, d, monkeypatch, poisoned):
    monkeypatch.setattr("marginkernels.backends.triton.operands.CHUNK_BYTES", 1)
    case = Case(w_dtype=w_dtype, compute_dtype=BF16, c=40, d=d, sampled=True)
    p = problem(case, "cpu")
    with simulated("ttsem"):
        forward, (dx, dw, *more) = swept(p, p.w, p.index)
        gathered, (dx_, dw_, *more_) = swept(p, p.w[p.index], None)
    for ours, wanted in zip((*forward, dx, *more), (*gathered, dx_, *more_), strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(dw, torch.zeros_like(p.w).index_copy(0, p.index, dw_))


def test_norms_that_are_known_are_taken_as_they_are(poisoned):
    p = problem(Case(c=40), "cpu")
    with simulated("ttsem"):
        measured, _ = swept(p, p.w, None)
        known, _ = swept(p, p.w, None, measured[6])
        others, _ = swept(p, p.w, None, 2 * measured[6])
    assert all(map(torch.equal, known, measured))
    assert torch.equal(others[6], 2 * measured[6]) and not torch.equal(others[0], measured[0])


@needs_triton
def test_known_norms_are_not_taken_again():
    from marginkernels.backends.triton.forward import head_fwd
    from tools.gates import aot

    p = problem(Case(c=40), "cpu")
    wanted = dict(save_tiles=False, want_sum=False, want_max=False)
    counts = []
    for known in (None, torch.ones(40)):
        with aot.recorded_launches("sm_90") as launches:
            head_fwd(p.x, p.w, p.y, torch.tensor(8.0), None, None, known, **wanted, **p.settings)
        counts.append(sum(launch.arguments.get("inverse") is not None for launch in launches))
    assert counts == [2, 1]  # the one of x is left


def test_timing_a_step_writes_nothing():
    """Repeats a call as the tuning does."""
    from marginkernels.backends.triton.step import head_step, without_writing

    p = problem(Case(c=40), "cpu")
    rows = torch.ones(len(p.x))
    before = [t.clone() for t in (p.w, *p.state, p.numbers)]
    operands = (
        p.w, p.y, torch.tensor(8.0), None, None, rows, rows, torch.ones(40), torch.empty(0), rows,
        rows, None, None, p.state, p.numbers, p.random,
    )  # fmt: skip
    settings = dict(
        need_x=True, need_bias=False, need_scale=False, rule="sgd", project=False, first_class=0,
    )  # fmt: skip
    with simulated("ttsem"):
        head_step(p.x, *without_writing(operands), **settings, **p.settings)
        assert all(map(torch.equal, before, (p.w, *p.state, p.numbers)))
        head_step(p.x, *operands, **settings, **p.settings)
        assert not torch.equal(before[0], p.w)


def test_what_cannot_be_written_in_place_is_refused():
    case = Case(c=40)
    p = problem(case, "cpu")
    strided = p.state[0].t().contiguous().t()
    with simulated("ttsem"), pytest.raises(ValueError, match="state: expected a contiguous"):
        take("triton", case, p._replace(state=[strided]))
    with simulated("ttsem"), pytest.raises(ValueError, match="rule: expected a name and a number"):
        take("triton", case, p._replace(state=[*p.state, *p.state]))
