# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Computes the ops in plain PyTorch, on any device and up to fp64: the judge of other backends.

All ops go over blocks of classes. One block of the (N, C) logits exists at a time, and backward
makes it again. The code is meant to be read, and to run everywhere, not to be fast. In the shapes N
is the number of rows, C of classes, B of classes in a block, D of features, K of constants.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops, rules, transforms
from ..rounding import stored
from ..transforms import TRANSFORMS, Transform
from .base import Backend
from .reference_rows import (
    LogSumExp,
    SoftplusSum,
    finite,
    inverse_norm,
    is_zero_row,
    projected,
    unit_or_zero,
)

# numbers in a block: of its logits, and of its classes' rows; and the fewest classes in one
BLOCK_NUMBERS = 1 << 20
BLOCK_CLASSES = 128


class ReferenceBackend(Backend):
    """Runs plain PyTorch, which can run everywhere."""

    name: ClassVar[str] = "reference"
    priority: ClassVar[int] = 10
    caveat: ClassVar[str] = "plain PyTorch"
    updates: ClassVar[bool] = True

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Lists nothing: it runs on every device and in every type."""
        return []

    def register_kernels(self) -> None:
        """Registers the functions of this file for every device."""
        forward, backward = _without_autocast(head_fwd), _without_autocast(head_bwd)
        step = _without_autocast(head_step)
        ops.implement_head(self.name, forward, backward, "CompositeExplicitAutograd", step)


def _without_autocast(function: Callable) -> Callable:
    """Keeps an autocast around the call out of the op, whose compute type is an argument."""

    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **settings)

    return call


def _checked(
    transform: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    rows: int,
    bias: Tensor | None,
) -> Transform:
    """Returns the transform with its operands, after the checks of both sweeps."""
    return transforms.checked(
        "reference",
        TRANSFORMS,
        transform,
        row_parameter,
        constants,
        rows=rows,
        has_bias=bias is not None,
    )


class _Block(NamedTuple):
    """Holds B of the classes: their weights, and the logits of all rows of x."""

    classes: slice
    w: Tensor  # (B, D) as rounded
    w_inv: Tensor  # (B,)
    w_unit: Tensor  # (B, D) w, normalised where that side is
    product: Tensor  # (N, B) dot products with w_unit: the logits over the scale
    value: Tensor  # (N, B) of the transform
    slope: Tensor  # (N, B) of the transform
    z: Tensor  # (N, B) scale product + bias
    f: Tensor  # (N, B) scale value + bias
    is_out: Tensor  # (N, B) whether the pair takes no part in the sums

    def places(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Says which targets (N, L) are among these classes, and where."""
        inside = (y >= self.classes.start) & (y < self.classes.stop)
        return inside, torch.where(inside, y - self.classes.start, 0)


class _Classes(NamedTuple):
    """Holds all classes and what their logits depend on, to go over them block by block."""

    w: Tensor  # (C, D) as it came, or more rows with an index
    y: Tensor  # (N, L) int64, -1: no target here
    scale: Tensor  # ()
    bias: Tensor | None  # (C,)
    places: Tensor | None  # (C,) rows of w; None: all
    normalize_w: bool
    compute_dtype: torch.dtype
    transform: Transform
    sub_centers: int

    def blocks(self, x_unit: Tensor) -> Iterator[_Block]:
        """Makes the logits of ``x_unit`` (N, D) block by block."""
        count = max(BLOCK_NUMBERS // max(*x_unit.shape, 1), BLOCK_CLASSES)
        count = -(-count // self.sub_centers) * self.sub_centers
        for first in range(0, self.total, count):
            yield self._block(x_unit, slice(first, min(first + count, self.total)))

    @property
    def total(self) -> int:
        """Returns C."""
        return len(self.w if self.places is None else self.places)

    def rows(self, classes: slice) -> slice | Tensor:
        """Returns the places of classes in w."""
        return classes if self.places is None else self.places[classes]

    def _block(self, x_unit: Tensor, classes: slice) -> _Block:
        w = ops.rounded(self.w[self.rows(classes)], self.compute_dtype)
        w_inv = inverse_norm(w, self.compute_dtype)
        w_unit = w * w_inv[:, None] if self.normalize_w else w
        product = x_unit @ w_unit.T
        name, row_parameter, constants = self.transform
        value, slope = TRANSFORMS[name].function(product, row_parameter, constants)
        z, f = self.scale * product, self.scale * value
        if self.bias is not None:
            z, f = z + self.bias[classes], f + self.bias[classes]
        is_out = self._is_out(classes, product)
        return _Block(classes, w, w_inv, w_unit, product, value, slope, z, f, is_out)

    def _is_out(self, classes: slice, product: Tensor) -> Tensor:
        """Marks the targets' classes, and centres that another of their class exceeds."""
        here = torch.arange(classes.start, classes.stop, device=product.device)
        is_out = torch.zeros_like(product, dtype=torch.bool)
        if self.sub_centers > 1:
            groups = product.unflatten(1, (-1, self.sub_centers))
            winner = groups.argmax(2, keepdim=True)  # the first of equals
            is_out = torch.ones_like(groups, dtype=torch.bool).scatter(2, winner, False).flatten(1)
        for label in self.y.unbind(1):
            is_out |= here // self.sub_centers == (label // self.sub_centers)[:, None]
        return is_out

    def gradient(
        self,
        block: _Block,
        g: Tensor,  # (N, B) dL/df times the slope; of the targets, dL/d(scale cosine)
        x_unit: Tensor,  # (N, D)
        radial: Tensor | None,  # (C,) what flows through the norm of each class
    ) -> Tensor:
        """Returns the gradient of the block's weights (B, D), in the statistics dtype."""
        gradient = self.scale * (g.T @ x_unit)
        if self.normalize_w:
            gradient = projected(gradient, block.w, block.w_inv, self.compute_dtype)
        if radial is not None:
            unit = unit_or_zero(block.w, block.w_inv, self.compute_dtype)
            gradient = gradient + radial[block.classes, None] * unit
        return gradient


def head_fwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D)
    y: Tensor,  # (N,) or (N, L) int64, -1: no target here
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None = None,  # (C,) rows of w, which then has more
    known_w_inv: Tensor | None = None,  # (C,): measured all the same
    *,
    normalize_x: bool,
    normalize_w: bool,
    compute_dtype: torch.dtype,
    save_tiles: bool,  # never: this backend keeps none
    want_sum: bool,
    want_max: bool,
    transform: str,
    row_parameter: Tensor | None,  # (N,)
    constants: Tensor | None,  # (K,)
    sub_centers: int = 1,
) -> ops.Forward:
    """Computes the forward op; see :mod:`marginkernels.ops`."""
    checked = _checked(transform, row_parameter, constants, len(x), bias)
    labels = y if y.ndim == 2 else y[:, None]
    classes = _Classes(
        w, labels, scale, bias, index, normalize_w, compute_dtype, checked, sub_centers
    )
    x = ops.rounded(x, compute_dtype)
    x_inv = inverse_norm(x, compute_dtype) if normalize_x else x.new_ones(len(x))
    x_unit = x * x_inv[:, None] if normalize_x else x
    is_binary = TRANSFORMS[transform].one_versus_rest
    total = SoftplusSum(x) if is_binary else LogSumExp(x)
    target_cosine, logit_sum = x.new_zeros(y.shape), x.new_zeros(len(x))
    of_labels = target_cosine.view(labels.shape)
    logit_max = x.new_full((len(x),), -math.inf)
    w_inv = x.new_empty(classes.total)
    for block in classes.blocks(x_unit):
        w_inv[block.classes] = block.w_inv
        inside, places = block.places(labels)
        of_labels += torch.where(inside, block.product.gather(1, places), 0)
        total.add(block.f.masked_fill(block.is_out, -math.inf))
        if want_sum:
            term = torch.sigmoid(block.f) if is_binary else block.f
            logit_sum += term.masked_fill(block.is_out, 0).sum(1)
        if want_max:
            z = block.z.masked_fill(block.is_out, -math.inf)
            logit_max = torch.maximum(logit_max, z.amax(1))
    return ops.Forward(
        lse=total.result(),
        target_cosine=target_cosine,
        w_norm=torch.where(y >= 0, 1 / w_inv[y.clamp_min(0)], 0.0),
        logit_sum=logit_sum if want_sum else x.new_empty(0),
        logit_max=logit_max if want_max else x.new_empty(0),
        x_inv=x_inv,
        w_inv=w_inv,
        tiles=x.new_empty(0),
        w_rounded=x.new_empty(0, dtype=compute_dtype),
    )


def head_bwd(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index
    y: Tensor,  # (N,) or (N, L) int64, -1: no target here
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,) rows of w
    *results_and_gradients: Any,
    need_w: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx (N, D), dw as w, dbias (C,), dscale ()
    """Computes the backward op; see :mod:`marginkernels.ops`."""
    dw = w.new_zeros(w.shape if need_w else 0)

    def store(rows: slice | Tensor, classes: slice, gradient: Tensor) -> None:
        dw[rows] = gradient.to(w.dtype)

    dx, dbias, dscale = _sweep_backward(
        store if need_w else None, x, w, y, scale, bias, index, *results_and_gradients, **settings
    )
    return dx, dw, dbias, dscale


def head_step(
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index; updated
    y: Tensor,  # (N,) or (N, L) int64, -1: no target here
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,) rows of w
    lse: Tensor,  # (N,)
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,), updated
    tiles: Tensor,  # (0,)
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # as y
    grad_w_norm: Tensor | None,  # as y
    grad_sum: Tensor | None,  # (N,)
    state: list[Tensor],  # (rows of w, D or 1) each, updated
    numbers: Tensor,  # (NUMBERS,)
    random: Tensor,  # (2,) int64
    *,
    rule: str,
    project: bool,
    first_class: int,
    compute_dtype: torch.dtype,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # dx (N, D), dbias (C,), dscale ()
    """Computes the op that updates; see :mod:`marginkernels.ops`."""
    places = torch.arange(len(w), device=w.device)
    skip = numbers[rules.SKIP] != 0

    def update(rows: slice | Tensor, classes: slice, gradient: Tensor) -> None:
        old = [t[rows].to(gradient.dtype) for t in (w, *state)]
        new_w, new_state = rules.applied(rule, old[0], gradient, old[1:], numbers)
        if project:
            inverse = inverse_norm(new_w, compute_dtype)[:, None]
            new_w = new_w * inverse.masked_fill(is_zero_row(new_w, compute_dtype), 1.0)
        class_id = first_class + places[rows]
        for position, (t, new) in enumerate(zip((w, *state), (new_w, *new_state), strict=True)):
            t[rows] = torch.where(skip, t[rows], stored(new, t.dtype, position, random, class_id))
        w_inv[classes] = inverse_norm(ops.rounded(w[rows], compute_dtype), compute_dtype)

    return _sweep_backward(
        update, x, w, y, scale, bias, index, lse, x_inv, w_inv.clone(), tiles, grad_lse,
        grad_target, grad_w_norm, grad_sum, compute_dtype=compute_dtype, **settings,
    )  # fmt: skip


def _sweep_backward(
    # takes the gradient (B, D) of some classes: their rows of w, their places in the sweep
    take: Callable[[slice | Tensor, slice, Tensor], None] | None,
    x: Tensor,  # (N, D)
    w: Tensor,  # (C, D), or more rows with an index
    y: Tensor,  # (N,) or (N, L) int64, -1: no target here
    scale: Tensor,  # ()
    bias: Tensor | None,  # (C,)
    index: Tensor | None,  # (C,)
    lse: Tensor,  # (N,) from forward, as x_inv and w_inv
    x_inv: Tensor,  # (N,)
    w_inv: Tensor,  # (C,)
    tiles: Tensor,  # (0,): this backend keeps none
    grad_lse: Tensor,  # (N,)
    grad_target: Tensor,  # as y
    grad_w_norm: Tensor | None,  # as y
    grad_sum: Tensor | None,  # (N,)
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
    sub_centers: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # dx (N, D), dbias (C,), dscale ()
    """Sweeps backward, and hands the gradient of each block of classes on."""
    checked = _checked(transform, row_parameter, constants, len(x), bias)
    labels = y if y.ndim == 2 else y[:, None]
    classes = _Classes(
        w, labels, scale, bias, index, normalize_w, compute_dtype, checked, sub_centers
    )
    rows = ops.rounded(x, compute_dtype)
    x_unit = rows * x_inv[:, None] if normalize_x else rows
    dx = rows.new_zeros(rows.shape if need_x else 0)
    dbias = rows.new_empty(classes.total if need_bias else 0)
    dscale = rows.new_zeros(() if need_scale else 0)
    radial = None if grad_w_norm is None else _by_class(grad_w_norm, y, w_inv)
    is_binary = TRANSFORMS[transform].one_versus_rest
    for block in classes.blocks(x_unit):
        g = _logit_gradient(block, None if is_binary else lse, grad_lse, grad_sum)
        if need_bias:
            dbias[block.classes] = g.sum(0)
        if need_scale:
            dscale += (g * block.value).sum()
        inside, places = block.places(labels)
        of_targets = torch.where(inside, grad_target.reshape(labels.shape), 0)
        g = (g * block.slope).scatter_add_(1, places, of_targets)
        if need_x:
            dx += g @ block.w_unit
        if take is not None:
            take(
                classes.rows(block.classes), block.classes,
                classes.gradient(block, g, x_unit, radial),
            )  # fmt: skip
    if need_x:
        dx *= scale
        dx = projected(dx, rows, x_inv, compute_dtype) if normalize_x else dx
    return dx.to(x.dtype), dbias, dscale


def _logit_gradient(
    block: _Block,
    lse: Tensor | None,  # (N,); None: one versus rest
    grad_lse: Tensor,  # (N,)
    grad_sum: Tensor | None,  # (N,)
) -> Tensor:
    """Returns dL/df, (N, B); 0 for pairs that take no part in lse and logit_sum."""
    p = torch.sigmoid(block.f) if lse is None else torch.exp(block.f - finite(lse)[:, None])
    g = grad_lse[:, None] * p
    if grad_sum is not None:
        g = g + grad_sum[:, None]
    return g.masked_fill(block.is_out, 0)


def _by_class(
    grad_w_norm: Tensor,  # as y
    y: Tensor,  # (N,) or (N, L)
    w_inv: Tensor,  # (C,)
) -> Tensor:
    """Adds up what flows through |w_y|, by class (C,)."""
    radial, terms = torch.zeros_like(w_inv), torch.where(y >= 0, grad_w_norm, 0.0)
    return radial.index_add_(0, y.clamp_min(0).flatten(), terms.flatten())
