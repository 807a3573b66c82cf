# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps the state of losses, and computes statistics of the rows without synchronisation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops


class Stateful(nn.Module):
    """Remembers numbers from one training step to the next, in buffers.

    The buffers are fp32 at least, also when the module is cast to a narrower type, in which the
    small steps of an average would be rounded away. A forward reads them by :meth:`recall` and
    nowhere else, so that its result does not change when they move on.
    """

    _initial: Mapping[str, float] = MappingProxyType({})

    def remember(self, **initial: float) -> None:
        """Registers a buffer () for each number; integers stay integers."""
        self._initial = initial
        for name, number in initial.items():
            dtype = torch.int64
            if isinstance(number, float):
                dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.register_buffer(name, torch.tensor(number, dtype=dtype))

    def recall(self, name: str) -> Tensor:
        """Returns a copy of the number.

        Raises:
            RuntimeError: a forward in training mode is made within a backward pass, where it is the
                second of its kind. Nothing has moved by then.
        """
        return ops.snapshot(getattr(self, name), type(self).__name__ if self.training else "")

    def reset_parameters(self) -> None:
        """Restores the first numbers, and resets the other base."""
        for name, number in self._initial.items():
            getattr(self, name).fill_(number)
        others = getattr(super(), "reset_parameters", None)
        if others is not None:
            others()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        before = {name: getattr(self, name) for name in self._initial}
        super()._apply(fn, *args, **kwargs)
        for name, number in before.items():
            applied = getattr(self, name)
            if applied.dtype.itemsize < torch.float32.itemsize:
                setattr(self, name, number.to(applied.device))
        return self


def masked_mean(values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the mean over the kept rows and their number, () each; no rows have the mean 0."""
    weight = torch.ones_like(values) if kept is None else kept.to(values.dtype)
    count = weight.sum()
    return (values * weight).sum() / count.clamp_min(1), count


def masked_std(values: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the unbiased standard deviation over the kept rows, 0 for one, and their number."""
    mean, count = masked_mean(values, kept)
    variance, _ = masked_mean((values - mean) ** 2, kept)
    return (variance * count / (count - 1).clamp_min(1)).sqrt(), count


def moved_average(average: Tensor, value: Tensor, rate: float, usable: Tensor) -> Tensor:
    """Returns rate value + (1 - rate) average where ``usable`` () holds and the value is finite."""
    moved = rate * value.to(average.dtype) + (1 - rate) * average
    return torch.where(usable & moved.isfinite(), moved, average)
