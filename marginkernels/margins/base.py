# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines what a margin is: a function of a row's target cosine, in plain PyTorch on N numbers.

A margin is an ``nn.Module`` with ``forward(c, rows) -> t``. It maps the cosine c_i = cos(theta_i)
of row i and its target class to the t_i that takes its place, so that the target logit is
scale t_i. No kernel knows a margin. All angles and margins are in radians.

:class:`Margin` is the base of a margin, :class:`~marginkernels.margins.parametric.ParametricMargin`
that of a margin with a number or a table as m. The hooks of :class:`MarginHooks` have defaults: a
margin overrides those that it needs. A margin that is another ``nn.Module`` works too;
:func:`adapted` gives it the hooks that it lacks.

State goes into registered buffers and changes in training mode only. Derive from
:class:`~marginkernels.margins.statistics.Stateful` for that: compilers and
``torch.utils.checkpoint`` compute anew what they have not saved, also from a buffer that has moved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..rotation import Rotation
from ..transforms import IDENTITY, Transform


class Rows:
    """Holds what a margin may look at besides the cosine: (N,) tensors of the whole batch.

    The batch is that of all processes, so statistics of it are global. ``kept`` leaves out ignored
    rows. ``x_norm`` may be given as a function, which is called where a margin reads it.
    """

    label: Tensor  # int64, valid class of each row (0 for rows that are ignored)
    w_norm: Tensor | None  # |w_y|; None before the sweep, in ``negatives``
    row_margin: Tensor | None  # the margin that the call gave for each row
    kept: Tensor | None  # bool, whether the row takes part; None: all do
    noise: Tensor | None  # the numbers that ``draw`` gave; None: the margin draws them now
    scale: Tensor | None  # () of the step
    # (N, ``hardest``) the greatest cosines of the classes that are not the row's, the greatest
    # first; -inf where there are fewer classes
    hardest: Tensor | None

    def __init__(
        self,
        label: Tensor,
        x_norm: Tensor | Callable[[], Tensor],
        w_norm: Tensor | None,
        row_margin: Tensor | None,
        kept: Tensor | None = None,
        noise: Tensor | None = None,
        scale: Tensor | None = None,
        hardest: Tensor | None = None,
    ):
        self.label, self._x_norm, self.w_norm = label, x_norm, w_norm
        self.row_margin, self.kept, self.noise, self.scale = row_margin, kept, noise, scale
        self.hardest = hardest

    @property
    def x_norm(self) -> Tensor:
        """Returns |x_i|."""
        if not isinstance(self._x_norm, Tensor):
            self._x_norm = self._x_norm()
        return self._x_norm


# methods of margins that ``rotation`` speaks for
DECIDE_T = frozenset(
    ("__call__", "forward", "with_gradient", "of_rows", "target", "regularizer", "draw")
)


class Bounded(NamedTuple):
    """Names a tensor whose values have to lie in [low, high]."""

    value: Tensor
    low: float
    high: float
    expected: str  # the beginning of the error


class MarginHooks:
    """Declares the hooks of a margin, with defaults that add nothing to the loss.

    ``takes_row_margin`` says whether a call's ``row_margin`` may replace the margin's m.
    ``needs_target_cosine`` says whether ``negatives`` looks at c, ``hardest`` how many of a row's
    greatest cosines to other classes it reads. ``transforms_negatives`` follows from whether the
    class overrides ``negatives``. ``one_versus_rest`` says that the loss is no
    softmax: ``negatives`` names a transform of that kind, and ``combined`` makes the rows' losses.
    """

    training: bool
    __call__: Callable[..., Any]  # (c, rows) -> t
    takes_row_margin: bool = False  # whether ``row_margin`` may replace its m
    needs_target_cosine: bool = True  # whether ``negatives`` looks at c
    transforms_negatives: bool = False  # whether it overrides ``negatives``
    hardest: int = 0  # how many columns of ``rows.hardest`` ``negatives`` reads
    one_versus_rest: bool = False  # whether rows have a sum of softplus in place of log-sum-exp

    def __init_subclass__(cls, **settings: object) -> None:
        super().__init_subclass__(**settings)
        cls.transforms_negatives = cls.negatives is not MarginHooks.negatives
        # the first of all bases, because a mixin may override too
        decides = next(b for b in cls.__mro__ if vars(b).keys() & (DECIDE_T | {"rotation"}))
        if "rotation" not in vars(decides):  # what another base declares is no longer its t
            cls.rotation = MarginHooks.rotation  # type: ignore[method-assign]

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        """Returns the transform of the other classes' cosines.

        It is called before the sweep, without gradient.

        Args:
            c: the target's cosines (N,); an empty tensor unless ``needs_target_cosine``.
        """
        return IDENTITY

    def shift(self, rows: Rows) -> Tensor | None:
        """Returns the constant () that ``negatives`` adds to each value, with its gradient.

        Constants of a transform carry no gradient. A one-versus-rest margin that learns one of them
        returns it here too; None stands for one that learns none.
        """
        return None

    def combined(self, z_y: Tensor, total: Tensor, rows: Rows) -> Tensor:
        """Returns the losses (N,) of the rows of a one-versus-rest margin.

        Args:
            z_y: the targets' logits (N,).
            total: the sums (N,) of log(1 + exp(z)) over the logits z of the other classes.
        """
        raise NotImplementedError

    def rotation(self) -> Rotation | None:
        """Describes ``forward`` to kernels where it is a rotation by numbers, else returns None.

        A class that overrides ``forward``, or what it calls, declares it anew.
        """
        return None

    def regularizer(self, rows: Rows) -> Tensor | None:
        """Returns what is added to the rows' losses, () or (N,), or None."""
        return None

    def draw(self, x: Tensor, rank: int = 0) -> Tensor | None:
        """Draws the random numbers (N,) that the rows of x (N, D) need, or returns None.

        It is called in training mode, by the rank that has the rows. ``rows.noise`` brings the
        numbers to all ranks.
        """
        return None

    def check(
        self,
        num_classes: int,
        device: torch.device | None = None,
        row_margin: Tensor | None = None,
    ) -> None:
        """Raises ValueError or TypeError for settings that do not fit the head or the call.

        Args:
            device: that of the embeddings, or None where it is not known yet.
        """
        if row_margin is not None and not self.takes_row_margin:
            raise ValueError(f"row_margin: expected None for {name_of(self)}, which has no m")

    def bounded(self, row_margin: Tensor | None) -> Bounded | None:
        """Names the tensor whose values are checked, or returns None."""
        return None


class Margin(MarginHooks, nn.Module):
    """Replaces the target's cosine c by t = ``forward(c, rows)``: the base of all margins.

    A subclass defines ``forward``, and overrides the hooks of :class:`MarginHooks` that it needs.
    """

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        """Returns t (N,) for the target cosines c (N,)."""
        raise NotImplementedError


class _Adapted(MarginHooks):
    """Gives an ``nn.Module`` the hooks that it does not define itself."""

    # not check and bounded, which mean other things in modules that know nothing of margins
    _HOOKS = (
        "needs_target_cosine", "hardest", "negatives", "one_versus_rest", "shift", "combined",
        "regularizer", "draw",
    )  # fmt: skip

    def __init__(self, module: nn.Module):
        self.module, self.training = module, module.training
        self.transforms_negatives = hasattr(module, "negatives")
        self.takes_row_margin = getattr(module, "takes_row_margin", True)
        for hook in self._HOOKS:
            if hasattr(module, hook):
                setattr(self, hook, getattr(module, hook))

    def __call__(self, c: Tensor, rows: Rows) -> Tensor:
        return self.module(c, rows)


def adapted(module: nn.Module) -> MarginHooks:
    """Returns a margin with all hooks: the module itself where it is a :class:`Margin`."""
    return module if isinstance(module, Margin) else _Adapted(module)


def name_of(margin: MarginHooks) -> str:
    """Names a margin in errors, by the class that the user has given."""
    return type(margin.module if isinstance(margin, _Adapted) else margin).__name__


def straight_through(function: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
    """Returns ``function(c)``, with derivative 1 with respect to c."""
    return function(c.detach()) + (c - c.detach())
