# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes head_step: the backward sweep, with an update of w and its state in the place of dw."""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ... import rules
from . import configs
from .backward import BackwardSweep
from .configs import Config
from .dw import RowGradient, TakeDw
from .operands import UNIT, Operands, ceil_div
from .sources import Incoming
from .update import FUNCTORS, update_kernel

# numbers of each operand that a program of four warps has in registers: there are more operands
# than in the other kernels that hold whole rows
_HELD = 2048


def head_step(
    x: Tensor,  # (N, D), N > 0
    w: Tensor,  # (C, D), or more rows with an index; updated
    y: Tensor,  # (N,) or (N, L)
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,) rows of w
    lse: Tensor,  # (N,)
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,), updated
    tiles: Tensor,  # (N, classes of all tiles), or (0,)
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # as y
    grad_w_norm: Tensor | None,  # as y
    grad_sum: Tensor | None,  # (N,)
    state: list[Tensor],  # (rows of w, D) or (rows of w, 1) each, updated
    numbers: Tensor,  # (NUMBERS,)
    random: Tensor,  # (2,) int64
    *,
    normalize_x: bool,
    normalize_w: bool,
    compute_dtype: torch.dtype,
    need_x: bool,
    need_bias: bool,
    need_scale: bool,
    transform: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    rule: str,
    project: bool,
    first_class: int,
    w_rounded: Tensor | None = None,  # (C, D)
    sub_centers: int = 1,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the op of :mod:`marginkernels.ops`; ``config`` replaces the table's."""
    operands = Operands.of(
        x, w, y, scale, bias, index, normalize_w=normalize_w, compute_dtype=compute_dtype,
        transform=transform, row_parameter=row_parameter, constants=constants,
        sub_centers=sub_centers, config=config, w_rounded=w_rounded, load=configs.load(
            "gradient", transform, sub_centers,
            extras=bias is not None or grad_sum is not None or need_scale or y.numel() > len(x),
        ),
    )  # fmt: skip
    update = Update(w_inv, state, numbers, random, rule, project, first_class)
    update.check(w)
    incoming = Incoming(
        lse, x_inv, w_inv, grad_lse, grad_target, grad_w_norm, grad_sum
    ).contiguous()
    dx = x.new_empty(x.shape if need_x else 0)
    dbias = operands.statistics(operands.count if need_bias else 0)
    dscale = operands.statistics(0)
    dw_bytes = 4 * operands.width
    sweep = BackwardSweep.of(operands, incoming, tiles, dw_bytes, need_bias, need_scale)
    target_table = operands.lasting_target_table() if need_x else None  # dx is that of the old w
    dx_raw = sweep.run(need_x, dbias, TakeAndUpdate(sweep.of_rows(), update))
    if dx_raw is not None and target_table is not None:
        sweep.write_dx(dx_raw, *target_table, normalize_x, dx)
    return dx, dbias, sweep.scale_gradient() if need_scale else dscale


def without_writing(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the operands after x for a call that may be repeated, because it skips the update."""
    *others, numbers, random = operands
    numbers = numbers.clone()
    numbers[rules.SKIP] = 1
    return *others, numbers, random


class Update(NamedTuple):
    """Holds what a step moves in place, and by which rule."""

    w_inv: Tensor  # (C,)
    state: list[Tensor]  # (rows of w, D) or (rows of w, 1) each
    numbers: Tensor  # (NUMBERS,)
    random: Tensor  # (2,)
    rule: str
    project: bool
    first_class: int

    def check(self, w: Tensor) -> None:
        """Raises ValueError where there is no such rule, or a tensor is not contiguous."""
        if (self.rule, len(self.state)) not in FUNCTORS:
            raise ValueError(
                f"rule: expected a name and a number of states of {list(FUNCTORS)}, got "
                f"{(self.rule, len(self.state))}"
            )
        for name, t in (("w", w), ("w_inv", self.w_inv), *(("state", t) for t in self.state)):
            if not t.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")


class TakeAndUpdate(TakeDw):
    """Updates w and its state in the place of dw."""

    def __init__(self, gradient: RowGradient, update: Update) -> None:
        super().__init__(gradient)
        self.update = update
        self.settings = gradient.operands.rows_of(_HELD)

    def take(self, part: slice, rows: Tensor, raw: Tensor) -> None:
        """Updates some classes."""
        gradient, operands, update = self.gradient, self.gradient.operands, self.update
        state = update.state
        moved, index, first_class = [operands.w, *state], operands.index, update.first_class
        if index is None:
            moved, first_class = [t[part] for t in moved], first_class + part.start
        w, first, second = [*moved, None, None][:3]
        d = operands.w.shape[1]
        unit = math.gcd(d, UNIT)
        update_kernel[(ceil_div(len(rows), self.settings["BLOCK_R"]),)](
            raw, gradient.source.dw_factor, gradient.slot[part], gradient.sums, gradient.radial,
            update.w_inv[part], w, first, second, None if index is None else index[part],
            update.numbers, update.random,
            R=len(rows), D_UNITS=d // unit, first_class=first_class,
            inverse_limit=operands.inverse_limit, RULE=FUNCTORS[update.rule, len(state)],
            FIRST_PER_ROW=rules.RULES[update.rule].state[0].per_row, PROJECT=update.project,
            NORMALIZE=operands.normalize_w, COMPUTE_TYPE=_triton_type(operands.x.dtype),
            DRAW_FIRST=torch.bfloat16 in [t.dtype for t in (operands.w, *state[:1])],
            DRAW_SECOND=torch.bfloat16 in [t.dtype for t in state[1:]],
            UNIT=unit, **self.settings,
        )  # fmt: skip


def _triton_type(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
