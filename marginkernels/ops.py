# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the dispatcher ops: schemas, fake implementations and handles.

One schema serves every backend, as ``marginkernels::head_fwd_<backend>`` and so on. A
backend registers kernels for them (:func:`implement_head` in Python, ``TORCH_LIBRARY_IMPL`` in
C++); nothing here imports one.

The ops are sweeps over the classes; the (N, C) logits

    z_ij = r_i q_j <x_i, w_j> + bias_j        r_i = scale / |x_i| or scale, q_j = 1 / |w_j| or 1

exist only tile by tile. ``f`` is the transform of the negatives, the identity for most losses: see
:mod:`marginkernels.transforms`. Its functors take a cosine: f(z) = scale value(z / scale), and
f' = slope. ``head_fwd`` returns, per row and over the negatives,

    lse            (N,)  log sum exp f(z_ij); -inf for a row without negatives
    target_cosine  (N,)  r_i q_y <x_i, w_y> / scale: the target's, without margin, scale and bias;
                         a side that is not normalised keeps its norm
    w_norm         (N,)  |w_y|; this and target_cosine are 0 where y_i = -1
    logit_sum      (N,)  sum of f(z_ij), or (0,) unless ``want_sum``
    logit_max      (N,)  max of z_ij, or (0,) unless ``want_max``
    x_inv          (N,)  1 / |x_i| of the rows as rounded to ``compute_dtype``; ones if not
                         normalised
    w_inv          (C,)  1 / |w_j| likewise, always
    tiles          what the backend keeps for its own backward, or (0,) unless ``save_tiles``
    w_rounded      (C, D) the rows that are swept, rounded to ``compute_dtype``, or (0,) unless
                   ``keep_rounded``; a backward that gets them reads no other w

and ``head_bwd`` applies, in one more sweep, G_ij = (a_i exp(f - lse_i) + u_i) f' with a = grad_lse,
u = grad_sum, and G_iy = grad_target, the gradient of (scale target_cosine). It returns dx, dw,
dbias and dscale; a gradient that is not needed is a (0,) tensor. ``y`` is int64 with the place of
the target's row of w among those that are swept, or -1 for a target that is not here. Negatives are
all other classes. A bias of -inf masks its class: no part in lse, and logit_sum is -inf.

``y`` may be (N, L), L targets of a row, where one may come twice. Negatives are then the classes of
none of them. target_cosine, w_norm, grad_target and grad_w_norm are (N, L) too, and the gradients
of all targets of a row, or of a class, add up.

With ``sub_centers`` = K > 1 a class is K consecutive rows of w, its centres, and C counts rows. Of
each class the row with the greatest q_j <x_i, w_j> stands for it, the first of equals. The others
are as if they were not there, and so are all rows of the targets' classes. ``y`` names the centre
that is the target's.

A transform that is ``one_versus_rest`` brings the logits of a row together by another sum. Then

    lse        (N,)  sum of log(1 + exp f(z_ij)); 0 for a row without negatives
    logit_sum  (N,)  sum of sigmoid f(z_ij); it has no gradient, grad_sum is None

and G_ij = a_i sigmoid(f) f'.

``index``, sorted, names the rows of w that a sweep goes over; None: all of them. Then C counts
these rows, y, bias and w_inv go by the position among them, and dw alone has all rows of w: 0 where
the index does not name them. ``known_w_inv`` is w_inv where it is known already.

``head_step`` is ``head_bwd`` with an optimizer in place of dw. While the gradient of a class is in
the cache, the rule (:mod:`marginkernels.rules`) is applied to the class's row of w and of each
state, with the numbers of the step; ``project`` then gives the row the norm 1. bfloat16 is rounded
at random (:mod:`marginkernels.rounding`; ``random`` is seed and step, and row j of w the class
``first_class`` + j). w_inv becomes that of the new rows. dx is the gradient with the old w.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

from .numerics import GREATEST_NORM

_FWD_SCHEMA = """(Tensor x, Tensor w, Tensor y, Tensor scale, Tensor? bias, Tensor? index=None,
    Tensor? known_w_inv=None, *, bool normalize_x, bool normalize_w, ScalarType compute_dtype,
    bool save_tiles, bool want_sum, bool want_max, str transform, Tensor? row_parameter,
    Tensor? constants, bool keep_rounded=False, int sub_centers=1) -> (Tensor lse,
    Tensor target_cosine, Tensor w_norm, Tensor logit_sum, Tensor logit_max, Tensor x_inv,
    Tensor w_inv, Tensor tiles, Tensor w_rounded)"""
_BWD_SCHEMA = """(Tensor x, Tensor w, Tensor y, Tensor scale, Tensor? bias, Tensor? index,
    Tensor lse, Tensor x_inv, Tensor w_inv, Tensor tiles, Tensor grad_lse, Tensor grad_target,
    Tensor? grad_w_norm, Tensor? grad_sum, *, bool normalize_x, bool normalize_w,
    ScalarType compute_dtype, bool need_x, bool need_w, bool need_bias, bool need_scale,
    str transform, Tensor? row_parameter, Tensor? constants, Tensor? w_rounded=None,
    int sub_centers=1) -> (Tensor dx, Tensor dw, Tensor dbias, Tensor dscale)"""
_STEP_SCHEMA = """(Tensor x, Tensor(a!) w, Tensor y, Tensor scale, Tensor? bias, Tensor? index,
    Tensor lse, Tensor x_inv, Tensor(b!) w_inv, Tensor tiles, Tensor grad_lse, Tensor grad_target,
    Tensor? grad_w_norm, Tensor? grad_sum, Tensor(c!)[] state, Tensor numbers, Tensor random, *,
    bool normalize_x, bool normalize_w, ScalarType compute_dtype, bool need_x, bool need_bias,
    bool need_scale, str transform, Tensor? row_parameter, Tensor? constants, str rule,
    bool project, int first_class, Tensor? w_rounded=None, int sub_centers=1)
    -> (Tensor dx, Tensor dbias, Tensor dscale)"""
_CHECKED_SCHEMA = """(Tensor result, Tensor value, float low, float high, str what) -> Tensor"""
# an ``ignore_index`` that ignores no row: every label has to be a class
NO_LABEL = -(2**63)

_CHECKED_LABELS_SCHEMA = """(Tensor y, SymInt num_classes, int? ignore_index,
    str name='y') -> Tensor"""
_SNAPSHOT_SCHEMA = """(Tensor value, str moved_by) -> Tensor"""
_ROUNDED_SCHEMA = """(Tensor rows, ScalarType dtype) -> Tensor"""

LIBRARY = torch.library.Library("marginkernels", "DEF")

# built at import, because torch.compile(dynamic=True) cannot format a float
BAD_X = f"x: expected finite rows of norm at most {GREATEST_NORM:g}"
BAD_W = f"w: expected finite rows of norm at most {GREATEST_NORM:g}"


class Forward(NamedTuple):
    """Holds what ``head_fwd`` returns, in the op's order; the head of this file says what each is.

    The first five are the order of everything above the op: the Function, the exchange between
    ranks, and the loss.
    """

    lse: Tensor
    target_cosine: Tensor
    w_norm: Tensor
    logit_sum: Tensor
    logit_max: Tensor
    x_inv: Tensor
    w_inv: Tensor
    tiles: Tensor
    w_rounded: Tensor


class SweepSettings(NamedTuple):
    """Holds the settings of a forward sweep and of its backward."""

    backend: str
    normalize_x: bool
    normalize_w: bool
    compute_dtype: torch.dtype
    save_tiles: bool
    keep_rounded: bool
    want_sum: bool
    want_max: bool
    transform: str
    check_w: str  # for a w out of range: "raise", "mark" every lse by NaN, or "" to go on
    sub_centers: int = 1  # rows of w that a class has
    update: int = 0  # number of the optimizer's update that backward makes, see update.py; 0: none


def statistics_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Returns the type of accumulation and softmax statistics: fp32, or fp64 for fp64."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def head_fwd(backend: str) -> OpOverloadPacket:
    """Returns the forward op of a backend."""
    return getattr(torch.ops.marginkernels, f"head_fwd_{backend}")


def head_bwd(backend: str) -> OpOverloadPacket:
    """Returns the backward op of a backend."""
    return getattr(torch.ops.marginkernels, f"head_bwd_{backend}")


def head_step(backend: str) -> OpOverloadPacket:
    """Returns the op of a backend that sweeps backward and updates w on the way."""
    return getattr(torch.ops.marginkernels, f"head_step_{backend}")


def define_head(backend: str, tiles_shape: Callable[[int, int], tuple[int, int] | None]) -> None:
    """Defines the ops of a backend, and what they return under torch.compile.

    Args:
        tiles_shape: (N, C) -> the shape of the tiles that forward saves; None: it saves none.
    """

    def forward_fake(*args: Any, **settings: Any) -> Forward:
        return _head_fwd_fake(tiles_shape, *args, **settings)

    define(f"head_fwd_{backend}", _FWD_SCHEMA, forward_fake)
    define(f"head_bwd_{backend}", _BWD_SCHEMA, _head_bwd_fake)
    define(f"head_step_{backend}", _STEP_SCHEMA, head_step_fake)


def implement_head(
    backend: str,
    forward: Callable,
    backward: Callable,
    dispatch_key: str,
    step: Callable | None = None,
) -> None:
    """Registers Python functions as the kernels of a backend's ops.

    ``step`` may be None: then the backend serves no optimizer of :mod:`marginkernels.optim`.
    """
    LIBRARY.impl(f"head_fwd_{backend}", forward, dispatch_key)
    LIBRARY.impl(f"head_bwd_{backend}", backward, dispatch_key)
    if step is not None:
        LIBRARY.impl(f"head_step_{backend}", step, dispatch_key)


def checked(result: Tensor, value: Tensor, low: float, high: float, what: str) -> Tensor:
    """Returns a copy of ``result``, or raises ValueError unless all of ``value`` is in [low, high].

    Whatever is computed from the copy waits for the check, under torch.compile too.
    """
    return torch.ops.marginkernels.checked(result, value, low, high, what)


def checked_labels(
    y: Tensor, num_classes: int, ignore_index: int | None, name: str = "y"
) -> Tensor:
    """Returns a copy of ``y``.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in [0, num_classes).
    """
    return torch.ops.marginkernels.checked_labels(y, num_classes, ignore_index, name)


def snapshot(value: Tensor, moved_by: str = "") -> Tensor:
    """Returns a copy of ``value`` that no later move of it reaches; the gradient passes.

    It is an op of its own, because a compiler drops ``clone``. It would compute again from the
    buffer, which has moved by then, what it has not saved.

    Args:
        moved_by: the module whose forward goes on to move ``value``; "" where none does.

    Raises:
        RuntimeError: within a backward pass, where ``moved_by`` is given: a forward that is
            computed again there would move it twice, and see another value.
    """
    return torch.ops.marginkernels.snapshot(value, moved_by)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns rows as a sweep in ``dtype`` sees them, in its statistics dtype.

    The gradient passes. It is an op of its own, because a compiler drops the rounding.
    """
    if rows.dtype == dtype:
        return rows.to(statistics_dtype(dtype))
    return torch.ops.marginkernels.rounded(rows, dtype)


def refuse_recomputation(module: str) -> None:
    """Raises RuntimeError within a backward pass, where ``module`` would not repeat its forward."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{module}: expected no forward in training mode within a backward pass, which "
            "torch.utils.checkpoint makes: its state or random numbers have gone on since the "
            "first one. Leave the head out of the checkpointed part: it keeps no logits, so there "
            "is next to nothing to save"
        )


def _head_fwd_fake(
    tiles_shape: Callable[[int, int], tuple[int, int] | None],
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    index: Tensor | None = None,
    *_: Any,
    compute_dtype: torch.dtype,
    save_tiles: bool,
    want_sum: bool,
    want_max: bool,
    keep_rounded: bool = False,
    **__: Any,
) -> Forward:
    n, c = x.shape[0], (w if index is None else index).shape[0]

    def stat(size: int | torch.Size) -> Tensor:
        return x.new_empty(size, dtype=statistics_dtype(compute_dtype))

    shape = tiles_shape(n, c) if save_tiles else None
    return Forward(
        lse=stat(n),
        target_cosine=stat(y.shape),
        w_norm=stat(y.shape),
        logit_sum=stat(n if want_sum else 0),
        logit_max=stat(n if want_max else 0),
        x_inv=stat(n),
        w_inv=stat(c),
        tiles=stat(0) if shape is None else x.new_empty(shape, dtype=compute_dtype),
        w_rounded=x.new_empty((c, x.shape[1]) if keep_rounded else 0, dtype=compute_dtype),
    )


def _head_bwd_fake(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    *_: Any,
    need_w: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dbias, dscale = head_step_fake(x, w, y, scale, bias, index, **settings)
    return dx, w.new_empty(w.shape if need_w else 0), dbias, dscale


def head_step_fake(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    *_: Any,
    compute_dtype: torch.dtype,
    need_x: bool,
    need_bias: bool,
    need_scale: bool,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``head_step`` returns, without values."""
    stats, c = statistics_dtype(compute_dtype), (w if index is None else index).shape[0]
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(c if need_bias else 0, dtype=stats),
        x.new_empty(() if need_scale else 0, dtype=stats),
    )


def _checked(result: Tensor, value: Tensor, low: float, high: float, what: str) -> Tensor:
    if value.numel() > 0:
        least, greatest = (bound.item() for bound in value.aminmax())
        if not (low <= least and greatest <= high):  # a NaN fails both
            raise ValueError(f"{what}, got {greatest if low <= least else least:g}")
    return result.clone()


def _checked_labels(
    y: Tensor, num_classes: int, ignore_index: int | None, name: str = "y"
) -> Tensor:
    if y.numel() > 0:
        least, greatest = (bound.item() for bound in y.aminmax())
        if least >= 0 and greatest < num_classes:  # no row is ignored
            return y.clone()
    wrong = (y < 0) | (y >= num_classes)
    expected = f"{name}: expected labels in [0, {num_classes})"
    if ignore_index not in (None, NO_LABEL):
        wrong &= y != ignore_index
        expected += f" or ignore_index={ignore_index}"
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"{expected}, got {int(y[wrong][0])} in row {row}")
    return y.clone()


def _snapshot(value: Tensor, moved_by: str) -> Tensor:
    if moved_by:
        refuse_recomputation(moved_by)
    return value.clone()


def _rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype).to(statistics_dtype(dtype))


def _keep_dtype(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def define(name: str, schema: str, fake: Callable) -> None:
    """Defines an op, and what it returns under torch.compile."""
    LIBRARY.define(name + " ".join(schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"marginkernels::{name}", fake, lib=LIBRARY)


define("checked", _CHECKED_SCHEMA, lambda result, *_: torch.empty_like(result))
define("checked_labels", _CHECKED_LABELS_SCHEMA, lambda y, *_: torch.empty_like(y))
define("snapshot", _SNAPSHOT_SCHEMA, lambda value, _: torch.empty_like(value))
define(
    "rounded",
    _ROUNDED_SCHEMA,
    lambda rows, dtype: torch.empty_like(rows, dtype=statistics_dtype(dtype)),
)
torch.library.register_autograd(
    "marginkernels::snapshot", lambda _, grad: (grad, None), lib=LIBRARY
)
torch.library.register_autograd(
    "marginkernels::rounded",
    lambda ctx, grad: (grad.to(ctx.dtype), None),
    setup_context=_keep_dtype,
    lib=LIBRARY,
)
LIBRARY.impl("snapshot", _snapshot, "CompositeExplicitAutograd")
LIBRARY.impl("rounded", _rounded, "CompositeExplicitAutograd")
LIBRARY.impl("checked", _checked, "CompositeExplicitAutograd")
LIBRARY.impl("checked_labels", _checked_labels, "CompositeExplicitAutograd")
