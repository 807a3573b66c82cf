# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the heads of AdaFace's repository: its trainer runs with one import changed::

    from marginkernels.compat import adaface as head  # was: import head

What a head returns is no tensor of logits but a :class:`Logits`, from which ``CrossEntropyLoss``
and ``F.cross_entropy`` compute the fused loss. Unchanged are the signatures, first weights at a
seed, and the ``state_dict``: ``kernel`` (D, C), and AdaFace's ``t``, ``batch_mean`` and
``batch_std``. These things differ:

- Cosines are not clamped to 1 - 1e-3 (AdaFace) or 1 - 1e-4 in size. The clamp stops the gradient
  of rows that are nearer to a class than 2.6 or 0.8 degrees.
- The heads normalise embeddings, which the project's backbones have normalised. The gradient that
  reaches what was normalised is the same.
- A batch of one row leaves AdaFace's statistics as they are, where the project makes them NaN, and
  eval mode leaves them, too.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import arguments, margins
from ..update import version
from .norm_statistics import KeepsStatistics
from .weights import FusedHead

__all__ = ["AdaFace", "ArcFace", "CosFace", "Logits", "build_head"]

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OPERATORS = [
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r")),
    *(f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne")),
    *(f"__{name}__" for name in ("neg", "pos", "abs", "invert", "bool", "int", "float", "array")),
    "__getitem__", "__contains__",
]  # fmt: skip
_WRITES = [*(f"__i{name}__" for name in _BINARY), "__setitem__"]


class Logits:
    """Stands for the logits (N, C) of a head, and computes their cross-entropy by a sweep.

    Whatever else is asked of it, it computes the logits, holds them, and answers as the tensor that
    they are. A warning says so. Only :meth:`tensor` may be written to.

    It holds the embeddings, m and s of the forward pass, and the head's kernel. So it is an error
    to ask after ``optimizer.step()`` for what was not computed before.
    """

    def __init__(self, head: "Head", embeddings: Tensor, labels: Tensor):
        self._head, self._embeddings, self.labels = head, embeddings, labels
        self._tensor: Tensor | None = None
        self._training = head.margin.training  # a margin's statistics move once
        self._m, self._s, self._kernel = head.m, head.s, head.kernel
        # torch.compile traces no versions
        compiled = torch.compiler.is_compiling()
        self._versions = None if compiled else [version(t) for _, t in self._tensors()]

    @property
    def shape(self) -> torch.Size:
        """Returns (N, C)."""
        return torch.Size((len(self._embeddings), self._head.classnum))

    def tensor(self) -> Tensor:
        """Returns the logits."""
        if self._tensor is None:
            self._check_unchanged()
            head, x = self._head, self._embeddings
            cosine = F.linear(F.normalize(x), F.normalize(head.rows().to(x.dtype)))
            column = self.labels.clamp_min(0)
            c, ones = cosine.gather(1, column[:, None])[:, 0], torch.ones_like(cosine[:, 0])
            rows = margins.Rows(column, x.norm(dim=1), ones, None)
            t = self._once(lambda: head.margin(c, rows))
            self._tensor = self._s * cosine.scatter(1, column[:, None], t[:, None])
        return self._tensor

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Computes ``F.cross_entropy`` of the logits, whose arguments it takes."""
        same = target is self.labels or torch.equal(target, self.labels)
        if self._tensor is not None or not same or (size_average, reduce) != (None, None):
            return F.cross_entropy(
                self._known("a cross-entropy of other labels, or with size_average or reduce,"),
                target, weight, size_average, ignore_index, reduce, reduction,
                label_smoothing,
            )  # fmt: skip
        self._check_unchanged()
        head = self._head
        loss: Tensor = self._once(
            lambda: head.fused_loss(
                self._embeddings, self.labels, margin=head.margin, scale=self._s,
                class_weight=weight, ignore_index=ignore_index, reduction=reduction,
                label_smoothing=label_smoothing, backend=head.backend,
            )
        )  # fmt: skip
        return loss

    def _once(self, compute: Callable[[], Tensor]) -> Tensor:
        """Returns what it computes with the m of the forward pass.

        The margin is in training mode the first time alone.
        """
        margin = self._head.margin
        training, m = margin.training, margin.m
        margin.train(self._training)
        if m is not self._m:
            margin.m = self._m
        try:
            result = compute()
        finally:
            margin.train(training)
            if m is not self._m:
                margin.m = m
        self._training = False
        return result

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Returns what it computes from, with names."""
        given = {
            "kernel": self._kernel, "embeddings": self._embeddings, "m": self._m, "s": self._s,
        }  # fmt: skip
        return [(name, t) for name, t in given.items() if isinstance(t, Tensor)]

    def _check_unchanged(self) -> None:
        """Raises RuntimeError if what it computes from has changed since the forward pass."""
        if self._versions is None or torch.compiler.is_compiling():
            return
        for (name, t), before in zip(self._tensors(), self._versions, strict=True):
            if version(t) != before or (name == "kernel" and t is not self._head.kernel):
                raise RuntimeError(
                    f"Logits: {name} has changed since. Compute from the logits what you need "
                    "before optimizer.step(), or keep tensor()"
                )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.cross_entropy and isinstance(args[0], cls):
            return args[0].cross_entropy(*args[1:], **(kwargs or {}))
        name = func.__name__
        _refuse_writes(name)
        args, kwargs = tree_map_only(cls, lambda lazy: lazy._known(name), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        _refuse_writes(name)
        return getattr(self._known(name), name)

    def __len__(self) -> int:
        return len(self._embeddings)

    def _known(self, name: str) -> Tensor:
        if self._tensor is None:
            warnings.warn(
                f"Logits: {name} needs all (N, C) logits, which are computed and held. The "
                "cross-entropy does without them; tensor() has no warning",
                stacklevel=1,  # from here, so that Python shows it once for each name
            )
        return self.tensor()


def _refuse_writes(name: str) -> None:
    """Raises RuntimeError for the name of a tensor's method that writes in place."""
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if in_place or name in _WRITES:
        raise RuntimeError(f"Logits: {name} writes in place, for which they need to be tensor()")


def _operator(name: str) -> Callable[..., Any]:
    """Makes the operator of this name, which Python looks for in the class alone."""

    def operator(self: Logits, *args: Any) -> Any:
        _refuse_writes(name)
        return getattr(self._known(name), name)(*tree_map_only(Logits, Logits.tensor, args))

    return operator


for _name in (*_OPERATORS, *_WRITES):
    setattr(Logits, _name, _operator(_name))


class Head(FusedHead):
    """Serves as the base of the project's heads: a ``kernel`` (D, C), a margin and a scale.

    ``m`` and ``s`` may be reassigned at any step. ``backend`` is that of
    :func:`marginkernels.margin_cross_entropy`.
    """

    weight_name, transposed = "kernel", True
    margin: margins.ParametricMargin

    def __init__(
        self,
        embedding_size: int,
        classnum: int,
        s: float,
        margin: margins.ParametricMargin,
        backend: str = "auto",
    ):
        super().__init__()
        self.embedding_size = arguments.integer("embedding_size", embedding_size)
        self.classnum = arguments.integer("classnum", classnum)
        self.s, self.backend = arguments.number("s", s, above=0), backend
        self.margin = margin
        # the project's numbers at a seed, which are drawn column after column
        kernel = torch.empty(embedding_size, classnum).uniform_(-1, 1)
        self.kernel = nn.Parameter(kernel.renorm_(2, 1, 1e-5).mul_(1e5))

    @property
    def m(self) -> Any:
        """Returns the margin's m."""
        return self.margin.m

    @m.setter
    def m(self, value: float) -> None:
        self.margin.m = value

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module looks for modules before it looks for properties
        if name == "m":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, embbedings: Tensor, norms: Tensor | None, label: Tensor) -> Logits:
        """Returns what stands for the logits (N, C), margin and scale included.

        Args:
            embbedings: (N, D), of length 1, under the project's name.
            norms: (N, 1), the lengths before, of which AdaFace makes its margins.
            label: (N,) or (N, 1), int64.
        """
        n = len(embbedings)
        if embbedings.shape != (n, self.embedding_size):
            raise ValueError(
                f"embbedings: expected shape (N, {self.embedding_size}), got "
                f"{tuple(embbedings.shape)}"
            )
        if label.numel() != n:
            raise ValueError(f"label: expected shape ({n},), got {tuple(label.shape)}")
        labels = label if label.ndim == 1 else label.reshape(-1)
        return Logits(self, self._features(embbedings, norms), labels)

    def _features(self, embeddings: Tensor, norms: Tensor | None) -> Tensor:
        return embeddings


class AdaFace(KeepsStatistics, Head):
    """Has :class:`marginkernels.AdaFace` as the project has it.

    Args:
        embedding_size, classnum: D and C.
        m, h, t_alpha: as of the margin; the project's script has t_alpha = 0.01.
        s: scale.
        backend: see :func:`marginkernels.margin_cross_entropy`.
    """

    t: Tensor

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 70722,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 1.0,
        *,
        backend: str = "auto",
    ):
        margin = margins.AdaFace(m, h=h, t_alpha=t_alpha)
        super().__init__(embedding_size, classnum, s, margin, backend)
        self.h, self.t_alpha = margin.h, margin.t_alpha
        self.register_buffer("t", torch.zeros(1))  # unused, as in the project's checkpoints

    def _features(self, embeddings: Tensor, norms: Tensor | None) -> Tensor:
        n = len(embeddings)
        if norms is None or norms.numel() != n:
            got = "None" if norms is None else str(tuple(norms.shape))
            raise ValueError(f"norms: expected shape ({n}, 1), got {got}")
        return embeddings * norms.detach().reshape(n, 1)


class CosFace(Head):
    """Has :class:`marginkernels.CosFace`; arguments as of :class:`AdaFace`."""

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 51332,
        s: float = 64.0,
        m: float = 0.4,
        *,
        backend: str = "auto",
    ):
        super().__init__(embedding_size, classnum, s, margins.CosFace(m), backend)


class ArcFace(Head):
    """Has :class:`marginkernels.ArcFace`, no angle beyond pi; arguments as of :class:`AdaFace`."""

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 51332,
        s: float = 64.0,
        m: float = 0.5,
        *,
        backend: str = "auto",
    ):
        margin = margins.ArcFace(m, branch="clip")
        super().__init__(embedding_size, classnum, s, margin, backend)


def build_head(
    head_type: str,
    embedding_size: int,
    class_num: int,
    m: float,
    t_alpha: float,
    h: float,
    s: float,
) -> Head:
    """Builds the head of a type: "adaface", "arcface" or "cosface"."""
    if head_type == "adaface":
        return AdaFace(embedding_size, class_num, m=m, h=h, s=s, t_alpha=t_alpha)
    plain = {"arcface": ArcFace, "cosface": CosFace}
    if head_type not in plain:
        raise ValueError(f"head_type: expected one of {['adaface', *plain]}, got {head_type!r}")
    return plain[head_type](embedding_size, class_num, s=s, m=m)
