# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines insightface's schedule of the learning rate (arcface_torch, ``lr_scheduler.py``)."""

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import arguments


class PolynomialLRWarmup(LRScheduler):
    """Raises the learning rates linearly, and lowers them by a polynomial: one ``step()`` a batch.

    With b the rate that the optimizer begins with, step t has b t / warmup_iters, and from there on
    b (1 - (t - warmup_iters) / (total_iters - warmup_iters))^power down to 0 at ``total_iters``.
    As in insightface step 0 has b itself. insightface's own class raises a TypeError since torch
    2.7, which has dropped ``verbose``. Their ``state_dict`` load into each other.

    Args:
        optimizer: its groups may have different rates.
        warmup_iters, total_iters: steps to the greatest rate, and to 0.
        power: 1 for a straight line.
        last_epoch: the step to go on from, where ``initial_lr`` is in the optimizer's groups; else
            -1.
        verbose: has no effect.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_iters: float,
        total_iters: float = 5,
        power: float = 1.0,
        last_epoch: int = -1,
        verbose: bool = False,
    ):
        # a fraction of an epoch need not be a whole number of steps
        self.warmup_iters = arguments.number("warmup_iters", warmup_iters, least=0)
        self.total_iters = arguments.number("total_iters", total_iters, above=0)
        self.power = arguments.number("power", power)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rates of the groups at ``last_epoch``, from those of the step before."""
        step, rates = self.last_epoch, [group["lr"] for group in self.optimizer.param_groups]
        if step == 0 or step > self.total_iters:
            return rates
        if step <= self.warmup_iters:
            return self._warming(step)
        factor = (self._left(step) / self._left(step - 1)) ** self.power
        return [rate * factor for rate in rates]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """Returns the rates at ``last_epoch`` alone, for ``step(epoch)``."""
        if self.last_epoch <= self.warmup_iters > 0:
            return self._warming(self.last_epoch)
        factor = self._left(min(self.total_iters, self.last_epoch)) ** self.power
        return [rate * factor for rate in self.base_lrs]

    def _warming(self, step: int) -> list[float | Tensor]:
        return [rate * step / self.warmup_iters for rate in self.base_lrs]

    def _left(self, step: float) -> float:
        """Returns which share of the steps after the warm-up is left."""
        return 1.0 - (step - self.warmup_iters) / (self.total_iters - self.warmup_iters)
