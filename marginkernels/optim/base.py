# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what the optimizers of a head share: groups, state, the numbers of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import arguments, rules
from ..distributed.shard import ClassShard, local
from ..generators import random_seed
from ..modules import MarginSoftmaxHead
from ..update import Numbers, Update

Number = float | Tensor


class HeadUpdate(Update):
    """Updates the weights of a head for an optimizer."""

    def __init__(self, optimizer: "HeadOptimizer", head: MarginSoftmaxHead):
        super().__init__()
        self.optimizer, self.head, self.rule = optimizer, head, optimizer.rule
        self.index: Tensor | None = None  # the classes of the last step, or None for all
        self.found_inf: Tensor | None = None  # whether the last step was skipped, a number ()

    def weight(self) -> Tensor:
        return local(self.head.weight.detach())

    def state(self) -> list[Tensor]:
        held = self.optimizer.state[self.head.weight]
        return [local(held[s.name]) for s in rules.RULES[self.rule].state if s.name in held]

    @property
    def project(self) -> bool:  # type: ignore[override]
        return self.optimizer.param_groups[0]["project"]

    @property
    def first_class(self) -> int:
        shard: ClassShard | None = self.head.shard
        return 0 if shard is None else shard.start

    def holds(self, parameter: Tensor) -> bool:
        return any(p is parameter for p in self.optimizer.param_groups[0]["params"])

    def check(self, head: nn.Module) -> None:
        if head is not self.head or not self.holds(self.head.weight):
            raise RuntimeError(
                "head.weight: expected the parameter that its optimizer was given, but it has been "
                "replaced. Detach the optimizer (head_optimizer.detach()) and make a new one"
            )

    def numbers(self, upstream: list[Tensor], dtype: torch.dtype) -> Numbers:
        unscale, skip = self.optimizer.loss_scale(upstream, dtype)
        self.found_inf = skip if isinstance(skip, Tensor) else None
        step = self.optimizer.state[self.head.weight]["step"]
        group = self.optimizer.param_groups[0]
        clip = group["clip_row_norm"]
        common = [unscale, skip, torch.inf if clip is None else clip]
        random = torch.tensor([group["seed"], 0], device=step.device)
        random[1] = step
        return Numbers(self.optimizer.numbers(common, step, dtype), random)

    def applied(self, numbers: Numbers, index: Tensor | None) -> None:
        self.index = index
        _advance(self.optimizer.state[self.head.weight]["step"], numbers.of_step)


class HeadOptimizer(torch.optim.Optimizer):
    """Moves the weights of a head inside backward; see :mod:`marginkernels.optim`.

    Subclasses have the settings of the optimizer that they are named after, and these.

    Args:
        head: the head; its margin and its scale, where they learn, belong to another optimizer.
        state_dtype: of the state that has a number for each weight: None, the weight's, or
            torch.bfloat16 or torch.float32. bfloat16 is rounded at random
            (:mod:`marginkernels.rounding`).
        project: whether rows get the norm 1 after each update (SphereFace-R, arXiv:2109.05565).
        clip_row_norm: greatest norm of a class's gradient; longer ones are scaled down. None: no
            bound. The norm of the whole gradient is not known before the update, so that it
            cannot be a bound.
        scaler: the ``torch.amp.GradScaler`` that the loss is scaled with, or None. The update
            divides by its scale. It is skipped as a whole, with momentum and weight decay, where a
            number that arrives in backward is not finite.
    """

    rule: ClassVar[str]
    # for torch.amp.GradScaler: the step unscales and skips by itself
    _step_supports_amp_scaling: ClassVar[bool] = True

    def __init__(
        self,
        head: MarginSoftmaxHead,
        settings: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        project: bool = False,
        clip_row_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        _check_head(head)
        arguments.boolean("project", project)
        if clip_row_norm is not None:
            clip_row_norm = arguments.number("clip_row_norm", clip_row_norm, above=0)
        if state_dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(
                "state_dtype: expected torch.bfloat16, torch.float32 or None, got "
                + str(state_dtype)
            )
        self.scaler = scaler
        own = dict(project=project, clip_row_norm=clip_row_norm, seed=random_seed())
        parameters = [p for p in (head.weight, head.bias) if p is not None]
        super().__init__([{"params": parameters}], settings | own)
        self._state_dtype = state_dtype
        for p in parameters:
            self.state[p] = self._fresh_state(p)
        self.update = head._update = HeadUpdate(self, head)

    def coefficients(self, group: dict[str, Any], step: Tensor) -> list[Number]:
        """Returns the numbers of the rule, as :mod:`marginkernels.rules` orders them.

        Args:
            group: the settings as they are now.
            step: (), the number of steps so far.
        """
        raise NotImplementedError

    def has_state(self, name: str) -> bool:
        """Returns whether this optimizer keeps a state of its rule."""
        return True

    def numbers(self, common: list[Number], step: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the numbers of a step on the device, (NUMBERS,); nothing waits for the device."""
        values = common + self.coefficients(self.param_groups[0], step.to(dtype))
        values += [0.0] * (rules.NUMBERS - len(values))
        known = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
        numbers = torch.tensor(known, dtype=dtype, pin_memory=step.is_cuda)
        numbers = numbers.to(step.device, non_blocking=True)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                numbers[i] = value
        return numbers

    def loss_scale(self, upstream: list[Tensor], dtype: torch.dtype) -> tuple[Number, Number]:
        """Returns 1 over the loss scale, and a number other than 0 where a step is skipped."""
        scale = None if self.scaler is None else self.scaler._scale
        if scale is None:
            return 1.0, 0.0
        finite = torch.cat([g.reshape(-1) for g in upstream]).isfinite().all()
        return scale.to(finite.device).to(dtype).reciprocal(), (~finite).to(dtype)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Ends the step, whose weights backward has moved, and moves the bias.

        Raises:
            RuntimeError: there was no backward since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = self.update
        if update.head.weight.requires_grad:
            update.close()
        with torch.no_grad():
            self._step_bias()
        return loss

    def _step_bias(self) -> None:
        bias = self.update.head.bias
        if bias is None or bias.grad is None:
            return
        state, rows = self.state[bias], self.update.index
        dtype = torch.promote_types(bias.dtype, torch.float32)
        unscale, skip = self.loss_scale([local(bias.grad)], dtype)
        common: list[Number] = [unscale, skip, torch.inf]
        numbers = self.numbers(common, state["step"], dtype)
        parts = [s.name for s in rules.RULES[self.rule].state if s.name in state]
        held = [local(t)[:, None] for t in (bias.detach(), *(state[name] for name in parts))]
        chosen = slice(None) if rows is None else rows
        w, g, *old = (t[chosen].to(dtype) for t in (held[0], local(bias.grad)[:, None], *held[1:]))
        new_w, new = rules.applied(self.rule, w, g, old, numbers)
        for t, value in zip(held, (new_w, *new), strict=True):
            t[chosen] = torch.where(numbers[rules.SKIP] != 0, t[chosen], value.to(t.dtype))
        _advance(state["step"], numbers)
        bias.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the weight has no gradient, and ``step`` takes that of the bias."""

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Makes backward keep its rows for the update of a later one, outside of the context.

        The next backward outside sweeps over the rows of all. A row keeps D numbers in the compute
        type and a few more.
        """
        before, self.update.accumulates = self.update.accumulates, True
        try:
            yield
        finally:
            self.update.accumulates = before

    def detach(self) -> None:
        """Gives the plain head back, whose weight gets its gradient again."""
        self.update.head._update = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses another group.

        Raises:
            ValueError: always, but for the group of the head.
        """
        if self.param_groups:
            raise ValueError(
                "param_group: expected none, because this optimizer moves the weights of one head. "
                "Give other parameters to an optimizer of torch.optim"
            )
        super().add_param_group(param_group)

    def _fresh_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns the state before the first step."""
        state = {"step": torch.zeros((), device=local(parameter.detach()).device)}
        for part in rules.RULES[self.rule].state:
            if not self.has_state(part.name):
                continue
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            shape = parameter[:, :1] if parameter.ndim > 1 and part.per_row else parameter
            if not part.per_row:
                dtype = self._state_dtype or parameter.dtype
            state[part.name] = torch.zeros_like(shape, dtype=dtype, requires_grad=False)
        return state


def _advance(step: Tensor, numbers: Tensor) -> None:
    """Counts a step that was not skipped."""
    step.add_(numbers[rules.SKIP] == 0)


def _check_head(head: object) -> None:
    if not isinstance(head, MarginSoftmaxHead):
        raise TypeError(f"head: expected a MarginSoftmaxHead, got {type(head).__name__}")
    if head._update is not None:
        raise ValueError(
            "head: expected one without an optimizer of marginkernels.optim, but it has "
            f"one of the rule {head._update.rule!r}. Detach that first"
        )
    if head.weight.dtype == torch.float16:
        raise ValueError(
            "head: expected weights in float32, bfloat16 or float64, got float16, whose range is "
            "too small for updates. Make it with dtype=torch.bfloat16"
        )
