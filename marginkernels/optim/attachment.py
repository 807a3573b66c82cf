# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Attaches an optimizer to a head: what backward asks of it, and what the two refuse."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import rules
from ..distributed.shard import ClassShard, is_wrapped, local
from ..update import Numbers, Update, holder, moved

if TYPE_CHECKING:
    from .base import HeadOptimizer

_GIVEN = "that its optimizer was given"
_ANEW = "Detach the optimizer (head_optimizer.detach()) and make a new one"
_UNWRAPPED = (
    "expected one outside of DistributedDataParallel and its like, which wait for the gradient of "
    "its weight. Wrap the backbone alone; sharding= splits the classes over the ranks"
)


class Head(Protocol):
    """Names the attributes of a module whose weights an optimizer can move.

    The module hands ``_update`` to :func:`marginkernels.margin_cross_entropy`, with the rows of its
    weight.
    """

    weight_name: str  # of a parameter (C K, D), or a DTensor: the classes of the shard
    transposed: bool  # whether the parameter is the view (D, C K) of such rows
    bias: nn.Parameter | None  # (C,)
    shard: ClassShard | None
    _update: Update | None

    @property
    def sub_centers(self) -> int:
        """Returns K."""


def weight_of(head: Head) -> nn.Parameter:
    """Returns the parameter of class weights, by the name that the head gives it."""
    return getattr(head, head.weight_name)


def by_rows(head: Head, t: Tensor) -> Tensor:
    """Returns the weight of a head, or state of the same layout, as a view with rows of classes."""
    return t.t() if head.transposed else t


class HeadUpdate(Update):
    """Updates the weights of a head for an optimizer."""

    optimizer: "HeadOptimizer"

    def __init__(self, optimizer: "HeadOptimizer", head: Head):
        super().__init__()
        self.optimizer, self.head, self.rule = optimizer, head, optimizer.rule
        self.index: Tensor | None = None  # the classes of the last step, or None for all
        self.skipped: Tensor | None = None  # whether the last step was skipped, a number ()

    def weight(self) -> Tensor:
        # a detached tensor shares no version under torch.compile; a DTensor is not compiled
        weight = weight_of(self.head)
        if self.head.shard is None:
            return by_rows(self.head, weight)
        return local(weight.detach())

    def state(self) -> list[Tensor]:
        held = self.optimizer.state[weight_of(self.head)]
        parts = [held[s.name] for s in rules.RULES[self.rule].state if s.name in held]
        return [by_rows(self.head, local(part)) for part in parts]

    @property
    def project(self) -> bool:  # type: ignore[override]
        return self.optimizer.param_groups[0]["project"]

    @property
    def first_row(self) -> int:
        shard, per_class = self.head.shard, self.head.sub_centers
        return 0 if shard is None else shard.rows(per_class).start

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Returns the ranks that the classes are split over."""
        return None if self.head.shard is None else self.head.shard.group

    def parameters(self) -> list[Tensor]:
        return self.optimizer.param_groups[0]["params"]

    def described(self) -> str:
        group = self.optimizer.param_groups[0]
        settings = {
            key: "tensor" if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        return f"{self.rule}({settings}, accumulates={self.accumulates})"

    def check(self, w: Tensor) -> None:
        super().check(w)
        weight, own = weight_of(self.head), self.weight()
        name = f"head.{self.head.weight_name}"
        if is_wrapped(weight):
            raise RuntimeError(f"head: {_UNWRAPPED}")
        held = {id(p) for p in self.parameters()}
        same = (w.data_ptr(), w.shape) == (own.data_ptr(), own.shape)
        if not (same and all(id(p) in held for p in parameters(self.head))):
            raise RuntimeError(
                f"{name}: expected the parameter {_GIVEN}, but it has been replaced, split "
                "(fully_shard) or copied (torch.nn.DataParallel). Wrap the backbone alone, and "
                "split the classes by sharding=; or detach the optimizer "
                "(head_optimizer.detach()) and make a new one"
            )
        self.check_no_gradient()
        for t in self.state():
            if t.device != own.device or len(t) != len(own):
                raise RuntimeError(
                    f"{name}: expected {len(t)} classes on {t.device} as {_GIVEN}, got "
                    f"{len(own)} on {own.device}. {_ANEW}"
                )
            if not t.is_contiguous():
                raise RuntimeError(f"state: expected contiguous tensors, got strides {t.stride()}")
        check_dtypes(weight.dtype, [t.dtype for t in self.state()])
        if not own.is_contiguous():
            turned = ".t()" if self.head.transposed else ""
            raise RuntimeError(
                f"{name}: expected contiguous rows of classes, got strides {own.stride()}. Give it "
                f"{name}.data{turned}.contiguous(){turned}"
            )
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise RuntimeError(
                f"{name}: expected no hook on its gradient (register_hook, "
                "register_post_accumulate_grad_hook), which is never there. Remove the hook; "
                "clip_row_norm= bounds gradients"
            )

    def check_no_gradient(self) -> None:
        """Raises RuntimeError if the weight has got a gradient, which no step would use."""
        if weight_of(self.head).grad is not None:
            raise RuntimeError(
                f"head.{self.head.weight_name}.grad: expected None, because only the head's loss "
                "moves the weight, but there is a gradient from elsewhere. Set it to None, leave a "
                "penalty on the weight to weight_decay, or take an optimizer of torch.optim"
            )

    def numbers(self, upstream: list[Tensor], dtype: torch.dtype) -> Numbers:
        unscale, skip = self.optimizer.loss_scale(upstream, dtype)
        self.skipped = skip if isinstance(skip, Tensor) else None
        step = self.optimizer.state[weight_of(self.head)]["step"]
        group = self.optimizer.param_groups[0]
        clip = group["clip_row_norm"]
        common = [unscale, skip, torch.inf if clip is None else clip]
        return Numbers(self.optimizer.numbers(common, step, dtype), self.optimizer.random(step))

    def applied(self, numbers: Numbers, index: Tensor | None) -> None:
        self.index = index
        advance(self.optimizer.state[weight_of(self.head)]["step"], numbers.of_step)


def advance(step: Tensor, numbers: Tensor) -> None:
    """Counts a step that was not skipped."""
    step.add_(numbers[rules.SKIP] == 0)


def parameters(head: Head) -> list[nn.Parameter]:
    """Returns the weight of a head, and its bias where it has one."""
    return [p for p in (weight_of(head), head.bias) if p is not None]


def check_head(head: Any) -> None:
    """Raises TypeError or ValueError for a module whose weights no optimizer can move."""
    can_be_moved = isinstance(head, nn.Module) and hasattr(head, "_update")
    if not can_be_moved:
        raise TypeError(
            "head: expected a MarginSoftmaxHead or a head of marginkernels.compat, got "
            + type(head).__name__
        )
    other = holder(weight_of(head))
    if other is not None:
        raise ValueError(
            "head: expected one without an optimizer of marginkernels.optim, but it has one of "
            f"the rule {other.rule!r}. Detach that first"
        )
    if is_wrapped(weight_of(head)):
        raise ValueError(f"head: {_UNWRAPPED}")


def check_dtypes(weight: torch.dtype, state: list[torch.dtype]) -> None:
    """Raises ValueError for weights and states of types that no step takes together."""
    if weight not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"head: expected weights in float32, bfloat16 or float64, got {weight}, whose range is "
            "too small for updates. Make the head with dtype=torch.bfloat16"
        )
    if any((dtype == torch.float64) != (weight == torch.float64) for dtype in state):
        raise ValueError(
            f"state_dtype: expected a state in float64 for weights in float64, and for no others, "
            f"got {', '.join(map(str, state))} for {weight}"
        )


def _refuse_second(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raises RuntimeError where another optimizer has a weight that backward moves."""
    if torch.compiler.is_compiling():  # a compiled step is traced through its hooks
        return
    held = {key for key, update in moved().items() if update.optimizer is not optimizer}
    if held and any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"{type(optimizer).__name__}: expected parameters without the weight and bias of a "
            "head that has an optimizer of marginkernels.optim, which moves them. Leave them out "
            "(the other parameters of the head, as a learnable scale, stay), or call "
            "head_optimizer.detach()"
        )


register_optimizer_step_pre_hook(_refuse_second)
