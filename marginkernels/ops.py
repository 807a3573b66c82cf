# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The dispatcher ops: schemas, fake implementations and handles.

One schema serves every backend, as ``marginkernels::head_fwd_<backend>`` and
``head_bwd_<backend>``. A backend registers kernels for them (``torch.library`` in Python,
``TORCH_LIBRARY_IMPL`` in C++); nothing here imports one.

The two ops are sweeps over the classes; the (N, C) logits

    z_ij = r_i q_j <x_i, w_j> + bias_j        r_i = scale / |x_i| or scale, q_j = 1 / |w_j| or 1

exist only tile by tile. ``head_fwd`` returns, per row and over the negatives ``j != y_i``,

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

and ``head_bwd`` applies, in one more sweep, G_ij = (a_i exp(f - lse_i) + u_i) f' with a = grad_lse,
u = grad_sum, and G_iy = grad_target, the gradient of (scale target_cosine). It returns dx, dw,
dbias and dscale; a gradient that is not needed is a (0,) tensor. ``y`` is (N,) int64 with the local
class or -1 for a row that owns no target here. A bias of -inf masks its class: no part in lse, and
logit_sum is -inf.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "native", "reference")

_FWD_SCHEMA = """(Tensor x, Tensor w, Tensor y, Tensor scale, Tensor? bias, *,
    bool normalize_x, bool normalize_w, ScalarType compute_dtype, bool save_tiles, bool want_sum,
    bool want_max, str transform, Tensor? row_parameter, Tensor? constants)
    -> (Tensor lse, Tensor target_cosine, Tensor w_norm, Tensor logit_sum, Tensor logit_max,
    Tensor x_inv, Tensor w_inv, Tensor tiles)"""
_BWD_SCHEMA = """(Tensor x, Tensor w, Tensor y, Tensor scale, Tensor? bias, Tensor lse,
    Tensor x_inv, Tensor w_inv, Tensor tiles, Tensor grad_lse, Tensor grad_target,
    Tensor? grad_w_norm, Tensor? grad_sum, *, bool normalize_x, bool normalize_w,
    ScalarType compute_dtype, bool need_x, bool need_w, bool need_bias, bool need_scale,
    str transform, Tensor? row_parameter, Tensor? constants)
    -> (Tensor dx, Tensor dw, Tensor dbias, Tensor dscale)"""
_CHECKED_SCHEMA = """(Tensor result, Tensor value, float low, float high, str what) -> Tensor"""
_CHECKED_LABELS_SCHEMA = """(Tensor y, SymInt num_classes, int? ignore_index,
    str name='y') -> Tensor"""
_SNAPSHOT_SCHEMA = """(Tensor value, str moved_by) -> Tensor"""
_ROUNDED_SCHEMA = """(Tensor rows, ScalarType dtype) -> Tensor"""

LIBRARY = torch.library.Library("marginkernels", "DEF")

NORM_MAX = 1e15
# put together here: torch.compile(dynamic=True) cannot put a float into a string
BAD_X = f"x: expected finite rows of norm at most {NORM_MAX:g}"
BAD_W = f"w: expected finite rows of norm at most {NORM_MAX:g}"


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


class SweepSettings(NamedTuple):
    """Holds the settings of a forward sweep and of its backward."""

    backend: str
    normalize_x: bool
    normalize_w: bool
    compute_dtype: torch.dtype
    save_tiles: bool
    want_sum: bool
    want_max: bool
    transform: str
    check_w: str  # for a w out of range: "raise", "mark" every lse by NaN, or "" to go on


def norm_min(compute_dtype: torch.dtype) -> float:
    """Rows below this norm are zero rows: the inverse norm is clamped and the gradient is 0."""
    return 1e-4 if compute_dtype == torch.float16 else 1e-12


def statistics_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Accumulation and softmax statistics are fp32, or fp64 where that is computed in."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def tiles_shape(backend: str, n: int, c: int) -> tuple[int, int]:
    """Saved exponentials in the compute type, in each backend's layout, padded to whole vectors."""
    if backend == "triton":
        return n, (c + 127) // 128 * 128
    return c, (n + 15) // 16 * 16


def head_fwd(backend: str):
    """The forward op of a backend."""
    return getattr(torch.ops.marginkernels, f"head_fwd_{backend}")


def head_bwd(backend: str):
    """The backward op of a backend."""
    return getattr(torch.ops.marginkernels, f"head_bwd_{backend}")


def checked(result: Tensor, value: Tensor, low: float, high: float, what: str) -> Tensor:
    """Copy of ``result``, after raising ValueError unless all of ``value`` lies in [low, high].

    The copy makes whatever is computed from it wait for the check, under torch.compile too.
    """
    return torch.ops.marginkernels.checked(result, value, low, high, what)


def checked_labels(
    y: Tensor, num_classes: int, ignore_index: int | None, name: str = "y"
) -> Tensor:
    """Copy of ``y``, after ValueError unless labels are ``ignore_index`` or in [0, num_classes)."""
    return torch.ops.marginkernels.checked_labels(y, num_classes, ignore_index, name)


def snapshot(value: Tensor, moved_by: str = "") -> Tensor:
    """Copy of ``value`` that no later move of it reaches; the gradient passes.

    An op of its own, because a compiler takes ``clone`` for nothing, and what it has not saved it
    computes again from the buffer, which has moved by then.

    Args:
        moved_by: the module whose forward goes on to move ``value``; "" where none does.

    Raises:
        RuntimeError: within a backward pass, where ``moved_by`` is given: a forward that is
            computed again there would move it twice, and see another value.
    """
    return torch.ops.marginkernels.snapshot(value, moved_by)


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a sweep in ``dtype`` sees them, in its statistics dtype; the gradient passes.

    An op of its own, because a compiler takes the rounding for nothing.
    """
    if rows.dtype == dtype:
        return rows.to(statistics_dtype(dtype))
    return torch.ops.marginkernels.rounded(rows, dtype)


def refuse_recomputation(module: str) -> None:
    """RuntimeError within a backward pass, where a forward of ``module`` would not repeat the first
    one.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{module}: expected no forward in training mode within a backward pass, which "
            "torch.utils.checkpoint makes: its state or random numbers have gone on since the "
            "first one. Leave the head out of the checkpointed part: it keeps no logits, so there "
            "is next to nothing to save"
        )


def _head_fwd_fake(
    backend, x, w, y, scale, bias, *, compute_dtype, save_tiles, want_sum, want_max, **_
):
    n, c = x.shape[0], w.shape[0]

    def stat(size):
        return x.new_empty(size, dtype=statistics_dtype(compute_dtype))

    tiles = stat(0)
    if save_tiles:
        tiles = x.new_empty(tiles_shape(backend, n, c), dtype=compute_dtype)
    return (
        stat(n),
        stat(n),
        stat(n),
        stat(n if want_sum else 0),
        stat(n if want_max else 0),
        stat(n),
        stat(c),
        tiles,
    )


def _head_bwd_fake(x, w, y, scale, *_, compute_dtype, need_x, need_w, need_bias, need_scale, **__):
    stats = statistics_dtype(compute_dtype)
    return (
        x.new_empty(x.shape if need_x else 0),
        w.new_empty(w.shape if need_w else 0),
        x.new_empty(w.shape[0] if need_bias else 0, dtype=stats),
        x.new_empty(() if need_scale else 0, dtype=stats),
    )


def _checked(result, value, low, high, what):
    if value.numel() > 0:
        least, greatest = (bound.item() for bound in value.aminmax())
        if not (low <= least and greatest <= high):  # a NaN fails both
            raise ValueError(f"{what}, got {greatest if low <= least else least:g}")
    return result.clone()


def _checked_labels(y, num_classes, ignore_index, name="y"):
    wrong = (y < 0) | (y >= num_classes)
    expected = f"{name}: expected labels in [0, {num_classes})"
    if ignore_index is not None:
        wrong &= y != ignore_index
        expected += f" or ignore_index={ignore_index}"
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{expected}, got {int(y[row])} in row {row}")
    return y.clone()


def _snapshot(value, moved_by):
    if moved_by:
        refuse_recomputation(moved_by)
    return value.clone()


def _rounded(rows, dtype):
    return rows.to(dtype).to(statistics_dtype(dtype))


def _keep_dtype(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


def _define(name, schema, fake):
    LIBRARY.define(name + " ".join(schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"marginkernels::{name}", fake, lib=LIBRARY)


for _backend in BACKENDS:
    _define(f"head_fwd_{_backend}", _FWD_SCHEMA, functools.partial(_head_fwd_fake, _backend))
    _define(f"head_bwd_{_backend}", _BWD_SCHEMA, _head_bwd_fake)
_define("checked", _CHECKED_SCHEMA, lambda result, *_: torch.empty_like(result))
_define("checked_labels", _CHECKED_LABELS_SCHEMA, lambda y, *_: torch.empty_like(y))
_define("snapshot", _SNAPSHOT_SCHEMA, lambda value, _: torch.empty_like(value))
_define(
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
