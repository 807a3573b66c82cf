# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the op ``marginkernels::head_step``: a backward sweep with the optimizer's step in it.

It stands between the autograd Function and the op of a backend. It asks the :class:`Update` whether
backward may write, keeps the rows of batches that accumulate, and gets the numbers of the step.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .update import RowGradients, Update, of_number

Gradients = tuple[Tensor, Tensor, Tensor]  # dx, dbias, dscale

_OPEN_SCHEMA = "(Tensor like, int update) -> Tensor"
_SCHEMA = """(Tensor token, Tensor x, Tensor(a!) w, Tensor y, Tensor scale, Tensor? bias,
    Tensor? index, Tensor lse, Tensor x_inv, Tensor(b!) w_inv, Tensor tiles, Tensor grad_lse,
    Tensor grad_target, Tensor? grad_w_norm, Tensor? grad_sum, Tensor(c!)[] state, *, int update,
    str backend, bool normalize_x, bool normalize_w, ScalarType compute_dtype, bool need_x,
    bool need_bias, bool need_scale, str transform, Tensor? row_parameter, Tensor? constants,
    Tensor? w_rounded=None, int sub_centers=1) -> (Tensor dx, Tensor dbias, Tensor dscale)"""


def open_update(like: Tensor, number: int) -> Tensor:
    """Returns the token of a forward, see :meth:`Update.open`; ``like`` is on the device."""
    return torch.ops.marginkernels.open_update(like, number)


def reaches_weight(ctx: Any) -> bool:
    """Says whether backward goes on to the weight, as backward(inputs=...) may not.

    Args:
        ctx: the node in the graph, whose second operand is the weight.
    """
    return torch.compiler.is_compiling() or _reaches(ctx.next_functions[1][0])


def _compiled_reaches(weight: Tensor) -> bool:
    """Says the same of a compiled graph, in its backward, which is one node."""
    node = torch._C._current_autograd_node()
    after = () if node is None else node.next_functions
    of_weight = [n for n, _ in after if getattr(n, "variable", None) is weight]
    return all(map(_reaches, of_weight))


def _reaches(node: Any) -> bool:
    """Says whether the backward that runs goes on to a node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of torch.autograd.grad with respect to the weight
        raise RuntimeError(
            "head.weight: expected no torch.autograd.grad with respect to it, because its "
            "optimizer moves it in backward, and its gradient is never there. Take it of a plain "
            "head (head_optimizer.detach(), or a copy.deepcopy of the head)"
        ) from None


def require_unchanged(token: Tensor, number: int) -> None:
    """Raises RuntimeError if the weights have changed since the forward of the token."""
    of_number(number).require_unchanged(token)


def _head_step(
    token: Tensor,
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index; updated
    y: Tensor,  # (N,)
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,)
    lse: Tensor,  # (N,)
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,), updated
    tiles: Tensor,
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # (N,)
    grad_w_norm: Tensor | None,  # (N,)
    grad_sum: Tensor | None,  # (N,)
    state: list[Tensor],  # (C, D) or (C, 1) each, updated
    *,
    update: int,
    backend: str,
    compute_dtype: torch.dtype,
    row_parameter: Tensor | None,  # (N,)
    **settings: Any,
) -> Gradients:
    step = of_number(update)
    rows = RowGradients(
        x, y, lse, x_inv, grad_lse, grad_target, grad_w_norm, grad_sum, row_parameter
    )
    settings |= dict(compute_dtype=compute_dtype)
    classes = (w, scale, bias, index, w_inv)
    if not _compiled_reaches(step.parameters()[0]):
        step.require_unchanged(token)
        return _gradients(backend, rows, tiles, classes, **settings)
    step.admit(token)
    if not (step.accumulates or step.keeps_rows or len(x) == 0):
        return _write(step, backend, rows, tiles, classes, state, **settings)
    gradients = _gradients(backend, rows, tiles, classes, **settings)
    if index is not None and len(x):
        raise RuntimeError(
            "accumulate: expected all classes in each batch, got a sample (sampling=). Take a step "
            "for each batch, or all classes"
        )
    if len(x):
        shared = (scale, bias, settings["constants"], settings["transform"])
        step.keep(rows._replace(x=x.to(compute_dtype)), shared)
    if not step.accumulates:
        rows = step.take_kept() or _no_rows(rows)
        without = dict.fromkeys(("need_x", "need_bias", "need_scale"), False)
        _write(step, backend, rows, tiles[:0], classes, state, **settings | without)
    return gradients


def _write(
    step: Update,
    backend: str,
    rows: RowGradients,
    tiles: Tensor,
    classes: tuple[Any, ...],  # w, scale, bias, index, w_inv
    state: list[Tensor],
    **settings: Any,
) -> Gradients:
    """Updates w and the state, and returns the gradients that are needed."""
    w, scale, bias, index, w_inv = classes
    given, w_inv = [w, *state], w_inv.data
    w, *state = step.written_to(given)
    upstream = (rows.grad_lse, rows.grad_target, rows.grad_w_norm, rows.grad_sum)
    numbers = step.numbers([g for g in upstream if g is not None], rows.lse.dtype)
    with step.writing():
        gradients = ops.head_step(backend)(
            rows.x, w, rows.y, scale, bias, index, rows.lse, rows.x_inv, w_inv, tiles, *upstream,
            state, numbers.of_step, numbers.random, row_parameter=rows.row_parameter,
            rule=step.rule, project=step.project, first_class=step.first_row, **settings,
        )  # fmt: skip
        for old, new in zip(given, (w, *state), strict=True):
            if old.data_ptr() != new.data_ptr():  # a compiled graph may go on with its copy
                old.data.copy_(new)
    step.applied(numbers, index)
    if index is None:
        step.remember_norms(w_inv, settings["compute_dtype"])
    return gradients


def _gradients(
    backend: str, rows: RowGradients, tiles: Tensor, classes: tuple[Any, ...], **settings: Any
) -> Gradients:
    """Returns the gradients that are needed, and leaves w alone."""
    w, scale, bias, index, w_inv = classes
    dx, _, dbias, dscale = ops.head_bwd(backend)(
        rows.x, w, rows.y, scale, bias, index, rows.lse, rows.x_inv, w_inv, tiles, rows.grad_lse,
        rows.grad_target, rows.grad_w_norm, rows.grad_sum, need_w=False,
        row_parameter=rows.row_parameter, **settings,
    )  # fmt: skip
    return dx, dbias, dscale


def _no_rows(rows: RowGradients) -> RowGradients:
    """Returns a row without a class and without a gradient, for a batch that has none."""
    one = [None if t is None else t.new_zeros(1, *t.shape[1:]) for t in rows]
    without = rows.y.new_full((1, *rows.y.shape[1:]), -1)
    return RowGradients(*one)._replace(y=without)  # type: ignore[arg-type]


def _head_step_fake(
    token: Tensor, *operands: Any, update: int, backend: str, **settings: Any
) -> Gradients:
    return ops.head_step_fake(*operands, **settings)


def _open(like: Tensor, update: int) -> Tensor:
    return of_number(update).open()


ops.define("open_update", _OPEN_SCHEMA, lambda *_: torch.empty(2, dtype=torch.int64, device="cpu"))
ops.define("head_step", _SCHEMA, _head_step_fake)
ops.LIBRARY.impl("open_update", _open, "CompositeExplicitAutograd")
ops.LIBRARY.impl("head_step", _head_step, "CompositeExplicitAutograd")
