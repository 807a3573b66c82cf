# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what the optimizers of a head share: groups, state, the numbers of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .. import arguments, rules
from ..distributed.shard import local, require_agreement
from ..generators import random_seed
from ..pages import in_huge_pages
from ..rounding import stored
from . import loading
from .attachment import (
    Head,
    HeadUpdate,
    advance,
    by_rows,
    check_dtypes,
    check_head,
    parameters,
    weight_of,
)

Number = float | Tensor


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
        check_head(head)
        arguments.boolean("project", project)
        if clip_row_norm is not None:
            clip_row_norm = arguments.number("clip_row_norm", clip_row_norm, above=0)
        if state_dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(
                "state_dtype: expected torch.bfloat16, torch.float32 or None, got "
                + str(state_dtype)
            )
        if not isinstance(scaler, torch.amp.GradScaler | None):
            raise TypeError(
                f"scaler: expected a torch.amp.GradScaler or None, got {type(scaler).__name__}"
            )
        dtype = weight_of(head).dtype
        check_dtypes(dtype, [state_dtype or dtype])
        self.scaler = scaler
        settings |= dict(project=project, clip_row_norm=clip_row_norm)
        group = None if head.shard is None else head.shard.group
        if group is not None:
            require_agreement(
                group, optimizer=type(self).__name__, state_dtype=state_dtype,
                scaler=scaler is not None, **settings,
            )  # fmt: skip
        settings["seed"] = random_seed(group)
        held = parameters(head)
        super().__init__([{"params": held}], settings)
        self._state_dtype = state_dtype
        self.update = HeadUpdate(self, head)
        for p in held:
            self.state[p] = self._state_of(p, settings)
        head._update = self.update

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
        numbers = torch.tensor(known, dtype=dtype, device="cpu", pin_memory=step.is_cuda)
        numbers = numbers.to(step.device, non_blocking=True)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                numbers[i] = value
        return numbers

    def loss_scale(self, upstream: list[Tensor], dtype: torch.dtype) -> tuple[Number, Number]:
        """Returns 1 over the loss scale, and a number other than 0 where a step is skipped."""
        # none before it has scaled, or where it is off
        scale = getattr(self.scaler, "_scale", None)
        if scale is None:
            return 1.0, 0.0
        finite = torch.cat([g.reshape(-1) for g in upstream]).isfinite().all()
        skip = (~finite).to(dtype)
        if self.update.group is not None:  # the gradient of a target arrives at one rank
            dist.all_reduce(skip, dist.ReduceOp.MAX, group=self.update.group)
        return scale.to(finite.device).to(dtype).reciprocal(), skip

    def random(self, step: Tensor) -> Tensor:
        """Returns what the rounding is drawn from, (2,): the seed and the number of the step."""
        random = torch.full((2,), self.param_groups[0]["seed"], device=step.device)
        random[1] = step
        return random

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Ends the step, whose weights backward has moved, and moves the bias.

        Raises:
            RuntimeError: there was no backward since the last step.
        """
        update = self.update
        if update.ended:
            raise RuntimeError(
                "step: expected an optimizer that is attached to its head, but it was detached. "
                "Step the plain head with an optimizer of torch.optim, or make a new one here"
            )
        if hasattr(self, "grad_scale") and self.scaler is None:
            raise RuntimeError(
                "scaler: expected the GradScaler that takes this step, got None, so that backward "
                "has moved the weights by the scaled gradient. Give it to the optimizer (scaler=)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update.check_no_gradient()
        if weight_of(update.head).requires_grad or update.written:
            update.close()
        with torch.no_grad():
            self._step_bias()
        update.index = None  # where the weight is frozen, no backward says so
        self._report()
        return loss

    def _report(self) -> None:
        """Lets ``GradScaler.update`` hear of a skipped step."""
        flag, self.update.skipped = self.update.skipped, None
        if flag is not None and self.scaler is not None:
            found = self.scaler._per_optimizer_states[id(self)]["found_inf_per_device"]
            flag = flag.float()
            found[flag.device] = torch.maximum(found.get(flag.device, flag), flag)

    def _step_bias(self) -> None:
        update = self.update
        bias, rows = update.head.bias, update.index
        if bias is None or bias.grad is None:
            return
        state, dtype = self.state[bias], torch.promote_types(bias.dtype, torch.float32)
        unscale, skip = self.loss_scale([local(bias.grad)], dtype)
        if self._is_unscaled():
            unscale = 1.0
        if isinstance(skip, Tensor) and update.skipped is not None:
            skip = torch.maximum(skip, update.skipped.to(dtype))
            update.skipped = skip
        numbers = self.numbers([unscale, skip, torch.inf], state["step"], dtype)
        parts = [s.name for s in rules.RULES[self.rule].state if s.name in state]
        held = [local(t)[:, None] for t in (bias.detach(), *(state[name] for name in parts))]
        per_class = update.head.sub_centers
        chosen = torch.arange(len(held[0]), device=held[0].device)
        if rows is not None:
            chosen = rows[::per_class] // per_class
        w, g, *old = (t[chosen].to(dtype) for t in (held[0], local(bias.grad)[:, None], *held[1:]))
        new_w, new = rules.applied(self.rule, w, g, old, numbers)
        random, class_id = self.random(state["step"]), update.first_row // per_class + chosen
        for position, (t, value) in enumerate(zip(held, (new_w, *new), strict=True)):
            value = stored(value, t.dtype, position, random, class_id, of_bias=True)
            t[chosen] = torch.where(numbers[rules.SKIP] != 0, t[chosen], value)
        advance(state["step"], numbers)
        bias.grad = None

    def _is_unscaled(self) -> bool:
        """Says whether ``GradScaler.unscale_`` has divided the gradient of the bias already."""
        if self.scaler is None or not self.scaler.is_enabled():
            return False
        return self.scaler._per_optimizer_states[id(self)]["stage"] is OptState.UNSCALED

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
        if not self.update.ended:
            self.update.head._update = None
            self.update.end()

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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes settings and state, the latter in this optimizer's types and tensors.

        The state of a ``torch.optim`` optimizer of the same name loads too, if it has the same
        parameters: ``[head.weight]``, or ``[head.weight, head.bias]``. Settings that it lacks stay
        as they are. Rows that wait for their update are forgotten, and so is an interrupted step
        when the weights are loaded too.

        Raises:
            ValueError: it is the state of another optimizer. Nothing has been changed.
        """
        state_dict = state_dict.copy()
        for prepare in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = prepare(self, state_dict) or state_dict
        group = self.param_groups[0]
        settings = loading.settings(self, state_dict)
        states = {p: self.state[p] for p in group["params"]}
        if self.has_state(group | settings) and not self.has_state(group):
            states = {p: self._state_of(p, group | settings) for p in states}
        for own, value in loading.values(type(self).__name__, states, state_dict):
            local(own).copy_(loading.held(value, own, self.update.head.shard))
        self.state.update(states)
        group.update(settings)
        self.update.reset()
        for finish in self._optimizer_load_state_dict_post_hooks.values():
            finish(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: expected no copy and no pickle of an optimizer that moves a "
            "head. Make one for the copy of the head, and load_state_dict() into it"
        )

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the state of a parameter before the first step."""
        state = {"step": torch.zeros((), device=local(parameter.detach()).device)}
        for part in rules.RULES[self.rule].state if self.has_state(group) else ():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            like = parameter.detach()
            if parameter.ndim > 1 and part.per_row:
                head = self.update.head
                like = by_rows(head, by_rows(head, like)[:, :1])
            if not part.per_row:
                dtype = self._state_dtype or parameter.dtype
            state[part.name] = torch.zeros_like(like, dtype=dtype)
            in_huge_pages(local(state[part.name]))
        return state
