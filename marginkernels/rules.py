# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the rules by which a step moves the class weights: SGD, AdamW and row-wise Adagrad.

The functions here are the definitions; their twins are csrc/update.h and
backends/triton/update.py. Each takes rows of weights w (R, D), their gradient g (R, D), their
state and the numbers of the step, all in fp32 (fp64 for fp64). It returns the new weights and the
new state. The numbers are a tensor on the device, so that a learning rate may change at each step
without a wait and without a recompilation.

A new rule is a row of :data:`RULES` here, a functor in csrc/update.h, a twin in
backends/triton/update.py, and a class in :mod:`marginkernels.optim`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Positions in the numbers of a step; csrc/numerics.h has the same.
UNSCALE = 0  # what the gradient is multiplied with first: 1 over the loss scale
SKIP = 1  # 0, or anything else where the step is to write nothing
MAX_ROW_NORM = 2  # greatest norm of a class's gradient, or inf
OF_RULE = 3  # where the numbers of the rule begin
NUMBERS = 12  # how many there are

Updated = tuple[Tensor, list[Tensor]]


class State(NamedTuple):
    """Names a part of a rule's state, as torch's optimizers name it."""

    name: str
    per_row: bool = False  # whether it is (C, 1) and not (C, D)


class Rule(NamedTuple):
    """Holds the facts of a rule that its twins must share."""

    name: str
    state: tuple[State, ...]
    # (w, g, state, numbers of the rule) -> (w, state); none of the operands is changed
    function: Callable[[Tensor, Tensor, list[Tensor], Tensor], Updated]


def _sgd(w: Tensor, g: Tensor, state: list[Tensor], numbers: Tensor) -> Updated:
    """Takes a step of ``torch.optim.SGD``; the state is empty without momentum."""
    lr, weight_decay, momentum, grad_weight, direct, through = numbers[:6]
    d = g + weight_decay * w
    if not state:
        return w - lr * d, []
    buffer = momentum * state[0] + grad_weight * d
    return w - lr * (direct * d + through * buffer), [buffer]


def _adamw(w: Tensor, g: Tensor, state: list[Tensor], numbers: Tensor) -> Updated:
    """Takes a step of ``torch.optim.AdamW`` (arXiv:1711.05101)."""
    decay, beta1, beta2, eps, step_size, root_correction = numbers[:6]
    mean = state[0] + (1 - beta1) * (g - state[0])
    square = beta2 * state[1] + (1 - beta2) * g * g
    return decay * w - step_size * mean / (square.sqrt() / root_correction + eps), [mean, square]


def _rowwise_adagrad(w: Tensor, g: Tensor, state: list[Tensor], numbers: Tensor) -> Updated:
    """Takes a step of Adagrad with one number per class, as FBGEMM's EXACT_ROWWISE_ADAGRAD."""
    lr, weight_decay, eps = numbers[:3]
    d = g + weight_decay * w
    total = state[0] + (d * d).mean(1, keepdim=True)
    return w - lr / (total.sqrt() + eps) * d, [total]


_RULES = (
    Rule("sgd", (State("momentum_buffer"),), _sgd),
    Rule("adamw", (State("exp_avg"), State("exp_avg_sq")), _adamw),
    Rule("rowwise_adagrad", (State("sum", per_row=True),), _rowwise_adagrad),
)
RULES = {rule.name: rule for rule in _RULES}


def applied(
    rule: str,
    w: Tensor,  # (R, D)
    g: Tensor,  # (R, D)
    state: list[Tensor],  # (R, D) or (R, 1) each
    numbers: Tensor,  # (NUMBERS,)
) -> Updated:
    """Returns weights and state after a step: the gradient unscaled and bounded, then the rule."""
    g = g * numbers[UNSCALE]
    norm = g.norm(dim=1, keepdim=True)
    bound = (numbers[MAX_ROW_NORM] / norm).clamp_max(1)  # 1 where both are infinite
    g = g * bound.where(norm > numbers[MAX_ROW_NORM], 1.0)
    return RULES[rule].function(w, g, state, numbers[OF_RULE:])
