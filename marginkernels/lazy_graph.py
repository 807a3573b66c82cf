# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Puts a tensor that has no values into autograd's graph.

A stand has the shape (N, C) and a node in the graph behind it: hooks of modules, activation
checkpoints and DistributedDataParallel meet a tensor like any other. What is computed of it takes
its factors x and w from :func:`operands`. Their gradients go back through the stand's own node as a
:class:`Pair`, so that everything between the stand and its layer sees a gradient pass::

    x, w -> _Product -> stand -> ... -> _Factors -> x, w -> loss

A hook of the stand itself gets the pair, which it may read or scale. No gradient (N, C) exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import validation
from .call import resolve_compute_dtype
from .update import Update, version

_aten = torch.ops.aten
_SCALES = (_aten.mul.Tensor, _aten.div.Tensor)
_SAME = (_aten.alias.default, _aten.clone.default, _aten.detach.default, _aten.view.default)


def gives_the_same(func: Any, args: tuple) -> bool:
    """Returns whether an op gives its first argument, in the same shape."""
    resized = func is _aten.view.default and tuple(args[1]) != tuple(args[0].size())
    return func in _SAME and not resized


class Factors(NamedTuple):
    """Holds the factors of a stand, without their graph, and how it is made of them."""

    x: Tensor  # (N, D)
    w: Tensor  # (C K, D)
    sub_centers: int
    compute_dtype: torch.dtype
    update: Update | None  # of an optimizer of marginkernels.optim
    rows: tuple[int, ...]  # the stand's shape without the classes
    dtype: torch.dtype  # the stand's
    device: torch.device
    versions: tuple[int, int]  # of x and w

    @classmethod
    def of(cls, x: Tensor, w: Tensor, sub_centers: int, update: Update | None) -> "Factors":
        """Returns the factors of cosines (N, C), after checks."""
        validation.check_factors(x, w, sub_centers)
        dtype = resolve_compute_dtype(x, w, None)
        versions = version(x), version(w)
        return cls(x, w, sub_centers, dtype, update, x.shape[:1], dtype, x.device, versions)

    def having(self, **changes: Any) -> "Factors":
        """Returns these factors with another x, or of a stand with another shape, type or place."""
        changed = self._replace(**changes)
        return changed._replace(versions=(version(changed.x), version(changed.w)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the stand's shape."""
        return (*self.rows, len(self.w) // self.sub_centers)

    def checked(self) -> "Factors":
        """Returns the factors if they are what they were when the stand was made.

        Raises:
            RuntimeError: they have changed since.
        """
        for name, t, before in zip(("x", "w"), self[:2], self.versions, strict=True):
            if version(t) != before:
                raise RuntimeError(
                    f"LazyCosine: {name} has changed since. Compute from the cosines what you need "
                    "before optimizer.step(), or keep tensor()"
                )
        return self


class Stand(Tensor):
    """Is a tensor without values, in place of the cosines of its factors."""

    factors: Factors

    def alike(self) -> Any:
        """Returns another of the same factors, without a graph."""
        return bare(type(self), self.factors)


def bare(cls: Any, factors: Factors) -> Any:
    """Makes a stand without a graph."""
    made = _without_values(cls, factors)
    made.factors = factors._replace(x=factors.x.detach(), w=factors.w.detach())
    return made


def _without_values(cls: Any, like: Factors) -> Any:
    made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
    torch._C._set_throw_on_mutable_data_ptr(made)  # else C code reads from address 0
    return made


def stand(cls: Any, factors: Factors) -> Any:
    """Makes a stand whose gradient goes to its factors, where one of them wants it."""
    return _Product.apply(factors.x, factors.w, cls, factors)


def operands(lazy: Stand) -> Factors:
    """Returns the factors with a graph that leads back through the stand."""
    factors = lazy.factors.checked()
    if not (torch.is_grad_enabled() and lazy.requires_grad):
        return factors
    x, w = _Factors.apply(lazy)
    return factors._replace(x=x, w=w)


def cosines(factors: Factors) -> Tensor:
    """Computes the cosines in the stand's shape, type and place."""
    dtype = factors.compute_dtype
    with torch.autocast(factors.x.device.type, enabled=False):
        x, w = F.normalize(factors.x).to(dtype), F.normalize(factors.w).to(dtype)
        product = F.linear(x, w)
    if factors.sub_centers > 1:
        product = product.unflatten(1, (-1, factors.sub_centers)).max(2).values
    return product.to(factors.device, factors.dtype).reshape(factors.shape)


class Pair(Tensor):
    """Is the gradient of a stand: those of its factors."""

    like: Factors  # of the stand
    x: Tensor | None
    w: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Factors, x: Tensor | None, w: Tensor | None) -> "Pair":
        made = _without_values(cls, like)
        made.like, made.x, made.w = like, x, w
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pair(of x: {self.x is not None}, of w: {self.w is not None})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if gives_the_same(func, args):
            return cls(args[0].like, args[0].x, args[0].w)
        if func is _aten.add.Tensor and all(isinstance(t, cls) for t in args):
            one, other = args
            return cls(one.like, _sum(one.x, other.x), _sum(one.w, other.w))
        if func in _SCALES and isinstance(args[0], cls) and getattr(args[1], "ndim", 0) == 0:
            scaled = (None if g is None else func(g, args[1]) for g in (args[0].x, args[0].w))
            return cls(args[0].like, *scaled)
        raise RuntimeError(
            f"{func}: the gradient of a LazyCosine is one of x and one of w, and no (N, C). Take "
            "tensor() for that"
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, cls: Any, factors: Factors) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factors = factors
        return bare(cls, factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None or isinstance(gradient, Pair):
            return *(getattr(gradient, name, None) for name in ("x", "w")), None, None
        # of an op that met the stand below Python's functions
        factors = ctx.factors.checked()

        def dense(x: Tensor, w: Tensor) -> Tensor:
            return cosines(factors._replace(x=x, w=w))

        return *_partial_derivatives(dense, factors.x, factors.w, gradient), None, None


def _partial_derivatives(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Computes the gradients by x and w, with a graph of their own if one is wanted."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, w = (t.view_as(t).requires_grad_() for t in (x, w))  # of each alone, if w comes from x
        result = function(x, w)
    return torch.autograd.grad(result, (x, w), gradient, create_graph=again)


def with_gradient(factors: Factors, values: Tensor, classes: Tensor) -> Tensor:
    """Gives the cosines (N, k) of these classes the gradient that they have in x and w."""
    return _Chosen.apply(factors.x, factors.w, values, classes, factors.sub_centers)


class _Chosen(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, values: Tensor, classes: Tensor, sub_centers: int
    ) -> Tensor:
        ctx.save_for_backward(x, w, classes)
        ctx.sub_centers = sub_centers
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w, classes = ctx.saved_tensors

        def values(x: Tensor, w: Tensor) -> Tensor:
            of_class = w.unflatten(0, (-1, ctx.sub_centers))[classes].to(gradient.dtype)
            x = F.normalize(x.to(gradient.dtype))[:, None, :, None]
            return (F.normalize(of_class, dim=-1) @ x)[..., 0].max(2).values

        return *_partial_derivatives(values, x, w, gradient), None, None, None


class _Factors(Function):
    @staticmethod
    def forward(ctx: Any, lazy: Stand) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.like = lazy.factors
        return lazy.factors.x.detach(), lazy.factors.w.detach()

    @staticmethod
    def backward(ctx: Any, x: Tensor | None, w: Tensor | None) -> Any:
        return None if x is None and w is None else Pair(ctx.like, x, w)
