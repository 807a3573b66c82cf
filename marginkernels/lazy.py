# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Stands for the cosines (N, C) of a classifier layer without holding them."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from . import arguments, evaluation, lazy_graph, lazy_writes
from .functional import margin_cross_entropy
from .lazy_graph import Factors, Pair, Stand
from .update import Update

# what tells about a tensor without its values, and what goes along its graph
_METADATA = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.__hash__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device,
    Tensor.is_inference, Tensor.__format__, Tensor.register_hook,
    torch.is_floating_point, torch.is_complex, torch.is_inference, torch.numel,
}  # fmt: skip
_DERIVATIVES = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward, Tensor.retain_grad,
}  # fmt: skip
_PROPERTIES = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "grad",
    "retains_grad", "output_nr", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "_version", "itemsize", "nbytes", "_backward_hooks", "_post_accumulate_grad_hooks",
}  # fmt: skip


class LazyCosine(Stand):
    """Stands for ``F.linear(F.normalize(x), F.normalize(w))``, the cosines of a classifier layer.

    It is a tensor to those who ask for its shape, type, device or graph, and holds no cosine. It
    computes the loss, :meth:`accuracy`, ``topk``, ``argmax`` and ``max`` over the classes by a
    sweep. ``detach``, ``clone``, ``to`` and the like give another of its kind. So do ``squeeze``
    and ``unsqueeze`` of its rows, and an index of rows. Whatever else is asked of it, it computes
    the cosines, once, and from then on answers as the tensor (N, C) that they are, whose gradients
    flow to x and w. A warning says who asked; ``python -W error`` shows where.

    Example::

        def forward(self, x):  # of a classifier
            return LazyCosine(x, self.weight)

        cosines = classifier(embeddings)
        loss = cosines.loss(labels, margin=ArcFace(0.2), scale=32.0)

    It holds x and w, and computes from them what it is asked for. So it is an error to ask after
    ``optimizer.step()``. ``to`` leaves them where they are, and moves the answers. In a graph of
    torch.compile there is none: a frame that makes one, or calls one, breaks there.

    It is an error to write to it, or to another of its kind that comes from it: :meth:`tensor`
    gives a tensor to write to, and is what to go on with. It is an error, too, to ask for its
    gradient, by ``retain_grad`` or ``torch.autograd.grad(loss, cosines)``, because a sweep has that
    of x and that of w alone.

    Args:
        x: embeddings (N, D).
        w: class weights (C, D), or (C K, D): see :func:`margin_cross_entropy`.
        sub_centers: K. The cosine of a class is that of its nearest centre.
        update: of an optimizer of :mod:`marginkernels.optim`, for the loss.
    """

    _dense: Tensor | None = None

    # mypy would have a constructor return its class, which apply does
    @torch._disable_dynamo
    def __new__(  # type: ignore[misc]
        cls, x: Tensor, w: Tensor, *, sub_centers: int = 1, update: Update | None = None
    ) -> "LazyCosine":
        return lazy_graph.stand(cls, Factors.of(x, w, sub_centers, update))

    def loss(self, labels: Tensor, *, margin: Any, scale: Any, **options: Any) -> Any:
        """Computes :func:`margin_cross_entropy` of x and w, for cosines (N, C).

        ``options`` are its others, but for ``bias``, ``normalize``, ``sub_centers`` and ``shard``.
        """
        return _loss(self, labels, margin=margin, scale=scale, **options)

    @torch._disable_dynamo
    def accuracy(self, labels: Tensor, k: int = 1) -> Tensor:
        """Returns the share of rows whose label is among the k nearest classes, a 0-d tensor.

        ``labels`` are int64, one for each row.
        """
        if not isinstance(labels, Tensor) or labels.shape != self.shape[:-1]:
            came = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels: expected shape {tuple(self.shape[:-1])}, got {came}")
        nearest = self.detach().topk(k).indices
        return (nearest == labels[..., None]).any(-1).to(torch.get_default_dtype()).mean()

    def tensor(self) -> Tensor:
        """Returns the cosines as a plain tensor, (N, C) where it is not squeezed or indexed."""
        return _tensor(self)

    @classmethod
    @torch._disable_dynamo
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy_writes.refuse(LazyCosine, func, args, kwargs)
        if func in _DERIVATIVES:
            args, kwargs = _differentiated(func, args, kwargs)
        first = args[0] if args else None
        if func in _METADATA or _property_of(func) in _PROPERTIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answer = _ANSWERS.get(func)
        if isinstance(first, LazyCosine) and first._dense is None and answer is not None:
            result = NotImplemented if "out" in kwargs else answer(first, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        name = _property_of(func) or getattr(func, "__name__", str(func))

        def become(lazy: LazyCosine) -> Tensor:
            if lazy._dense is None:
                _warn(name)
            return _tensor(lazy)

        return func(
            *tree_map_only(LazyCosine, become, args), **tree_map_only(LazyCosine, become, kwargs)
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers what reaches a tensor below Python's functions."""
        kwargs = kwargs or {}
        lazy_writes.refuse(LazyCosine, func, args, kwargs)
        if args and isinstance(args[0], LazyCosine) and lazy_graph.gives_the_same(func, args):
            return args[0].alike()
        _warn(func.__name__)
        args, kwargs = tree_map_only(LazyCosine, _values, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._dense is not None:
            return repr(self._dense)
        return (
            f"LazyCosine(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"requires_grad={self.requires_grad})"
        )


def _warn(name: str) -> None:
    # from here, so that Python shows it once for each name
    warnings.warn(
        f"LazyCosine: {name} needs all (N, C) cosines, which are computed and held. loss, "
        "accuracy, argmax and topk over the classes do without them; tensor() has no warning",
        stacklevel=1,
    )


def _property_of(func: Callable) -> str:
    """Returns the name of the property that ``func`` reads, or ""."""
    is_getter = getattr(func, "__name__", "") == "__get__"
    return getattr(func.__self__, "__name__", "") if is_getter else ""  # type: ignore[attr-defined]


def _differentiated(func: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Returns the arguments of a backward pass, which ends at no stand.

    One that a reentrant checkpoint begins with a pair begins at the nodes of the stands.
    """
    wanted = args[1:2] if func is torch.autograd.grad else kwargs.get("inputs")
    if func is Tensor.retain_grad or any(isinstance(t, LazyCosine) for t in tree_leaves(wanted)):
        raise RuntimeError(
            f"{func.__name__}: a LazyCosine has no gradient (N, C). Ask for the gradients of x and "
            "w, or take tensor() first, and compute the loss from that"
        )

    def node(lazy: LazyCosine) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return get_gradient_edge(lazy)

    if any(isinstance(t, Pair) for t in tree_leaves((args, kwargs))):
        args = (tree_map_only(LazyCosine, node, args[0]), *args[1:])
    return args, kwargs


def _held(lazy: LazyCosine) -> Tensor | None:
    """Returns the cosines if they were computed, after a check that nobody wrote to them."""
    if lazy._dense is not None and lazy._dense._version > 0:
        raise RuntimeError(
            "LazyCosine: its tensor() was changed in place. Go on with the one that was changed"
        )
    return lazy._dense


def _tensor(lazy: LazyCosine) -> Tensor:
    """Returns the cosines, with the graph that they would have had from the beginning."""
    dense = _held(lazy)
    if dense is None:
        with torch.inference_mode(False), torch.set_grad_enabled(lazy.requires_grad):
            dense = lazy._dense = lazy_graph.cosines(lazy_graph.operands(lazy))
    return dense


def _values(lazy: LazyCosine) -> Tensor:
    """Returns the cosines below autograd, which has a node for the stand already."""
    dense = _held(lazy)
    if dense is not None:
        return dense.detach()
    with torch.no_grad():
        return lazy_graph.cosines(lazy.factors.checked())


@torch._disable_dynamo
def _loss(lazy: LazyCosine, labels: Tensor, **options: Any) -> Any:
    if lazy.ndim != 2:
        raise ValueError(f"loss: expected cosines (N, C), got shape {tuple(lazy.shape)}")
    _held(lazy)
    given = lazy_graph.operands(lazy)
    options.setdefault("compute_dtype", given.compute_dtype)
    return margin_cross_entropy(
        given.x, given.w, labels, sub_centers=given.sub_centers, update=given.update, **options
    )


def _nearest(lazy: LazyCosine, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k greatest cosines of each row, and their classes."""
    given = lazy_graph.operands(lazy)
    classes = evaluation.Classes(
        given.w, lazy.shape[-1], compute_dtype=given.compute_dtype, sub_centers=given.sub_centers
    )
    values, places = evaluation.topk(classes, given.x, k)
    values = lazy_graph.with_gradient(given, values, places).to(given.device, given.dtype)
    shape = (*given.rows, k)
    return values.reshape(shape), places.to(given.device).reshape(shape)


def _like(function: Callable) -> Callable:
    """Makes a function of a stand from one that asks a tensor for its type and place alone."""

    def answer(lazy: LazyCosine, *args: Any, **kwargs: Any) -> Any:
        return function(torch.empty(0, dtype=lazy.dtype, device=lazy.device), *args, **kwargs)

    return answer


def _over_classes(lazy: LazyCosine, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, lazy.ndim - 1)


def _topk(
    lazy: LazyCosine, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    if not largest or not _over_classes(lazy, dim):
        return NotImplemented
    return torch.return_types.topk(_nearest(lazy, arguments.integer("k", k, most=lazy.shape[-1])))


def _max(lazy: LazyCosine, dim: Any = None, keepdim: bool = False) -> Any:
    if not _over_classes(lazy, dim):
        return NotImplemented
    values, places = _nearest(lazy, 1)
    if not keepdim:
        values, places = values[..., 0], places[..., 0]
    return torch.return_types.max((values, places))


def _argmax(lazy: LazyCosine, dim: Any = None, keepdim: bool = False) -> Any:
    if not _over_classes(lazy, dim):
        return NotImplemented
    with torch.no_grad():
        return _max(lazy, dim, keepdim).indices


def _detach(lazy: LazyCosine) -> Any:
    return lazy.alike()


def _clone(lazy: LazyCosine, *, memory_format: Any = None) -> Any:
    return _other(lazy)


def _view_as(lazy: LazyCosine, other: Tensor) -> Any:
    return _other(lazy) if other.shape == lazy.shape else NotImplemented


def _to(lazy: LazyCosine, *args: Any, **kwargs: Any) -> Any:
    """Gives answers another type or place: x and w stay what and where they are."""
    copy = kwargs.pop("copy", False)
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    dtype, device = dtype or lazy.dtype, device or lazy.device
    if not dtype.is_floating_point:
        return NotImplemented
    if (dtype, device, copy) == (lazy.dtype, lazy.device, False):
        return lazy
    return _other(lazy, dtype=dtype, device=device)


def _cpu(lazy: LazyCosine, memory_format: Any = None) -> Any:
    return _to(lazy, "cpu")


def _typed(dtype: torch.dtype) -> Callable:
    return lambda lazy, memory_format=None: _to(lazy, dtype)


def _squeeze(lazy: LazyCosine, dim: Any = None) -> Any:
    if (
        not isinstance(dim, int)
        or not -lazy.ndim <= dim < lazy.ndim
        or dim % lazy.ndim == lazy.ndim - 1
    ):
        return NotImplemented
    return _other(lazy, rows=_places(lazy).squeeze(dim % lazy.ndim).shape)


def _unsqueeze(lazy: LazyCosine, dim: int) -> Any:
    count = lazy.ndim + 1
    if not -count <= dim < count or dim % count == lazy.ndim:
        return NotImplemented
    return _other(lazy, rows=_places(lazy).unsqueeze(dim % count).shape)


def _getitem(lazy: LazyCosine, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    simple = all(p is None or isinstance(p, slice | list | Tensor) or type(p) is int for p in parts)
    taken = sum(
        p.ndim if isinstance(p, Tensor) and p.dtype == torch.bool else p is not None for p in parts
    )
    if not simple or taken > lazy.ndim - 1:
        return NotImplemented
    chosen = _places(lazy)[index]
    return _other(lazy, chosen.flatten(), rows=chosen.shape)


def _places(lazy: LazyCosine) -> Tensor:
    """Returns the numbers of the rows of x in the stand's shape without the classes."""
    rows = lazy.factors.rows
    return torch.arange(math.prod(rows), device=lazy.factors.x.device).reshape(rows)


def _other(lazy: LazyCosine, chosen: Tensor | None = None, **changes: Any) -> Any:
    """Makes another of some rows of x, in another shape, type or place."""
    given = lazy_graph.operands(lazy)
    x = given.x if chosen is None else given.x[chosen]
    return lazy_graph.stand(type(lazy), given.having(x=x, **changes))


_ANSWERS: dict[Callable, Callable] = {
    Tensor.topk: _topk, Tensor.max: _max, Tensor.argmax: _argmax,
    torch.topk: _topk, torch.max: _max, torch.argmax: _argmax,
    Tensor.detach: _detach, Tensor.data.__get__: _detach,  # type: ignore[attr-defined]
    Tensor.clone: _clone, torch.clone: _clone, Tensor.view_as: _view_as,
    Tensor.to: _to, Tensor.cpu: _cpu, Tensor.float: _typed(torch.float32),
    Tensor.double: _typed(torch.float64), Tensor.half: _typed(torch.float16),
    Tensor.bfloat16: _typed(torch.bfloat16),
    Tensor.squeeze: _squeeze, torch.squeeze: _squeeze,
    Tensor.unsqueeze: _unsqueeze, torch.unsqueeze: _unsqueeze, Tensor.__getitem__: _getitem,
    Tensor.new_tensor: _like(Tensor.new_tensor), Tensor.new_zeros: _like(Tensor.new_zeros),
    Tensor.new_ones: _like(Tensor.new_ones), Tensor.new_full: _like(Tensor.new_full),
    Tensor.new_empty: _like(Tensor.new_empty),
}  # fmt: skip
