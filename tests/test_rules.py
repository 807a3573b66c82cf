# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the rules of update and the rounding in C++ with their definitions in Python.

tests/test_update.py judges the steps of the sweeps.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from marginkernels import rounding, rules
from marginkernels.backends import native
from tests.support.updates import Case, Problem, problem, take

pytestmark = pytest.mark.skipif(native.extension is None, reason="no extension")

# numbers of a step of each rule, those of the rule alone
NUMBERS = {
    "sgd": (0.1, 0.01, 0.9, 0.7, 0.3, 1.0),
    "adamw": (0.99, 0.9, 0.99, 1e-3, 0.1, 0.5),
    "rowwise_adagrad": (0.1, 0.01, 1e-3),
}


def test_the_extension_has_the_positions_of_python():
    numbers = dict(native.extension.step_numbers)
    assert numbers.pop("PHILOX_ROUNDS") == rounding.PHILOX_ROUNDS
    assert numbers == {name: getattr(rules, name) for name in numbers}


def test_the_extension_knows_the_rules_of_python():
    known = native.extension.rules
    assert list(known) == list(rules.RULES), "csrc/update.h lacks one, or rebuild the extension"
    for name, rule in rules.RULES.items():
        assert [state.per_row for state in rule.state] in known[name], name
    assert [] in known["sgd"]


@pytest.mark.parametrize(
    ("name", "states"), [("sgd", 0), ("sgd", 1), ("adamw", 2), ("rowwise_adagrad", 1)]
)
def test_a_rule_of_the_extension_moves_a_row_as_python_does(name, states):
    rng = torch.Generator().manual_seed(0)
    facts = rules.RULES[name].state[:states]
    w, g = torch.randn(2, 1, 33, generator=rng)
    state = [torch.rand(1, 1 if s.per_row else 33, generator=rng) for s in facts]
    numbers = torch.tensor(NUMBERS[name])
    want_w, want_state = rules.RULES[name].function(w, g, state, numbers)
    got_w, got_state = w[0].numpy().copy(), [s[0].numpy().copy() for s in state]
    native.extension.update.apply_rule(name, got_w, g[0].numpy(), got_state, numbers.numpy())
    for got, want in zip([got_w, *got_state], [want_w, *want_state], strict=True):
        np.testing.assert_allclose(got, want[0], rtol=2e-6, atol=1e-7)


def test_the_extension_draws_the_words_of_python():
    random, classes = torch.tensor([-(7 << 40) + 12345, (1 << 33) + 17]), [0, 5, (1 << 34) + 3]
    for stream in range(2):
        want = rounding.random_words(random, torch.tensor(classes), 9, stream)
        got = native.extension.update.random_word(
            *random.tolist(), np.array(classes)[:, None], np.arange(9), stream
        )
        assert want.tolist() == got.tolist()


def test_the_extension_rounds_bit_by_bit_as_python_does():
    rng = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, 3e38, -3.4e38, 1e-40, torch.inf, -torch.inf])
    values = torch.cat([torch.randn(500, generator=rng), special])
    words = torch.randint(1 << 32, values.shape, generator=rng)
    for position, bits in enumerate((words & 0xFFFF, words >> 16)):
        ours = native.extension.update.bits_of(position, words.numpy().astype(np.uint32))
        assert ours.tolist() == bits.tolist()
        got = native.extension.update.stochastic_bf16(values.numpy(), ours)
        want = rounding.stochastically_rounded(values, bits).view(torch.int16)
        assert got.tolist() == (want.int() & 0xFFFF).tolist()
    nan = native.extension.update.stochastic_bf16(np.float32("nan"), 0xFFFF)
    assert nan & 0x7FC0 == 0x7FC0


BAD_STEPS: dict[str, Callable[[Problem], Problem]] = {
    "numbers": lambda p: p._replace(numbers=p.numbers[:5]),
    "random": lambda p: p._replace(random=p.random.float()),
    "state": lambda p: p._replace(state=[p.state[0][:, 1:]]),
    "rule": lambda p: p._replace(state=p.state * 3),
    "index": lambda p: p._replace(index=p.index.flip(0)),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_on_the_cpu_refuses_a_bad_operand(name):
    case = Case(sampled=True)
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: .*knows.*got 'sgd' with 3"):
        take("native", case, BAD_STEPS[name](problem(case, "cpu")))
