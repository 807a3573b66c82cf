# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what the optimizers of a head share: groups, state, the numbers of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import arguments, rules
from ..distributed.shard import ClassShard, local, require_agreement
from ..generators import random_seed
from ..update import Numbers, Update

Number = float | Tensor


class Head(Protocol):
    """Names the attributes of a module whose weights an optimizer can move.

    The module hands ``_update`` to :func:`marginkernels.margin_cross_entropy`, with its weight.
    """

    weight: nn.Parameter  # (C, D), or a DTensor: the classes of the shard
    bias: nn.Parameter | None  # (C,)
    shard: ClassShard | None
    _update: Update | None


class HeadUpdate(Update):
    """Updates the weights of a head for an optimizer."""

    optimizer: "HeadOptimizer"

    def __init__(self, optimizer: "HeadOptimizer", head: Head):
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
        return 0 if self.head.shard is None else self.head.shard.start

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Returns the ranks that the classes are split over."""
        return None if self.head.shard is None else self.head.shard.group

    def holds(self, parameter: Tensor) -> bool:
        return any(p is parameter for p in self.optimizer.param_groups[0]["params"])

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
        own = local(self.head.weight.detach())
        same = (w.data_ptr(), w.shape) == (own.data_ptr(), own.shape)
        if not (same and all(map(self.holds, _parameters(self.head)))):
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
        head: Head,
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
        settings |= dict(project=project, clip_row_norm=clip_row_norm)
        group = None if head.shard is None else head.shard.group
        if group is not None:
            require_agreement(
                group, optimizer=type(self).__name__, state_dtype=state_dtype,
                scaler=scaler is not None, **settings,
            )  # fmt: skip
        settings["seed"] = random_seed(group)
        parameters = _parameters(head)
        super().__init__([{"params": parameters}], settings)
        self._state_dtype = state_dtype
        for p in parameters:
            self.state[p] = self._state_of(p, settings, {})
        self.update = head._update = HeadUpdate(self, head)

    def coefficients(self, group: dict[str, Any], step: Tensor) -> list[Number]:
        """Returns the numbers of the rule, as :mod:`marginkernels.rules` orders them.

        Args:
            group: the settings as they are now.
            step: (), the number of steps so far.
        """
        raise NotImplementedError

    def has_state(self, group: dict[str, Any]) -> bool:
        """Returns whether this optimizer keeps the state of its rule with these settings."""
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
        skip = (~finite).to(dtype)
        if self.update.group is not None:  # the gradient of a target arrives at one rank
            dist.all_reduce(skip, dist.ReduceOp.MAX, group=self.update.group)
        return scale.to(finite.device).to(dtype).reciprocal(), skip

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes settings and state, the latter in this optimizer's types.

        A step that was interrupted, and rows that wait for their update, are forgotten.

        Raises:
            ValueError: they are not those of such an optimizer.
        """
        group, given = state_dict["param_groups"][0], state_dict["state"]
        lacking = self.defaults.keys() - group.keys()
        if lacking:
            raise ValueError(
                f"state_dict: expected the settings of {type(self).__name__}, got none for "
                f"{sorted(lacking)}. load_checkpoint takes the state of an optimizer of torch.optim"
            )
        states = {
            p: self._state_of(p, group, given.get(number, {}))
            for p, number in zip(self.param_groups[0]["params"], group["params"], strict=False)
        }
        super().load_state_dict(state_dict | {"state": {}})  # which would cast to the weight's type
        self.state.update(states)
        self.update.reset()

    def _state_of(
        self, parameter: Tensor, group: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Returns the state of a parameter: what is given, in its types, and zeros for the rest."""
        state = {}
        for part in rules.RULES[self.rule].state if self.has_state(group) else ():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            like = parameter.detach()
            like = like[:, :1] if parameter.ndim > 1 and part.per_row else like
            if not part.per_row:
                dtype = self._state_dtype or parameter.dtype
            value = given.get(part.name)
            if value is None:
                value = torch.zeros_like(like, dtype=dtype)
            elif value.shape != like.shape:
                raise ValueError(
                    f"state_dict: expected {part.name} {tuple(like.shape)}, got "
                    f"{tuple(value.shape)}"
                )
            state[part.name] = value.to(like.device, dtype)
        # torch.optim.SGD counts no steps
        step = given.get("step", float(any(given.get(name) is not None for name in state)))
        device = local(parameter.detach()).device
        return {"step": torch.as_tensor(step, dtype=torch.float32).to(device, copy=True)} | state


def _advance(step: Tensor, numbers: Tensor) -> None:
    """Counts a step that was not skipped."""
    step.add_(numbers[rules.SKIP] == 0)


def _parameters(head: Head) -> list[nn.Parameter]:
    return [p for p in (head.weight, head.bias) if p is not None]


def _check_head(head: Any) -> None:
    can_be_moved = isinstance(head, nn.Module) and hasattr(head, "_update")
    if not can_be_moved:
        raise TypeError(
            "head: expected a MarginSoftmaxHead or insightface's PartialFC_V2, got "
            + type(head).__name__
        )
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
