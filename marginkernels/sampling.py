# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Chooses the classes of a step: Partial FC (An et al., 2022, arXiv:2203.15565)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments, ops
from .generators import StepGenerators, random_seed

if TYPE_CHECKING:
    from .distributed.base import Exchange


class Sample(NamedTuple):
    """Names the classes of a step on this rank."""

    classes: Tensor  # (n,) int64, sorted rows of w
    valid: Tensor | None = None  # bool () on the device, whether it can be used; None: it can


class Sampling:
    """Chooses the classes that a step is computed on."""

    logq: bool = False

    @property
    def takes_all(self) -> bool:
        """Says whether all classes are taken."""
        return False

    def choose(self, exchange: "Exchange", local_class: Tensor, num_classes: int) -> Sample | None:
        """Returns the classes of a step, or None for all.

        Args:
            local_class: (N,), the rows' classes among the ``num_classes`` of this rank, or -1.
        """
        raise NotImplementedError

    def described(self) -> str:
        """Describes what has to be the same on all ranks."""
        return f"{type(self).__name__}(logq={self.logq})"


@dataclass(frozen=True)
class PartialFC(Sampling):
    """Computes each step on a share of the classes (An et al., 2022, arXiv:2203.15565).

    The sample has max(int(rate C), min(N, C)) of the C classes of each rank: the rows' own, and
    others at random. All other classes have gradient 0, and an optimizer of
    :mod:`marginkernels.optim` leaves their weights and their state as they are.

    Args:
        rate: the share of the classes, in (0, 1]; 1 is all of them.
        logq: adds -log(pi) to the logits of the classes sampled at random, pi = (n - P) / (C - P)
            for n sampled of C (on the rank), P of them the rows' own. The sum over the sample then
            estimates the sum over all classes.
        generator: of the sample, on the embeddings' device; None: torch's default one. A head keeps
            its own, whose state is saved with it.
    """

    rate: float
    logq: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not arguments.is_number(self.rate) or not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected a number in (0, 1], got {self.rate!r}")
        arguments.boolean("logq", self.logq)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                "generator: expected a torch.Generator or None, got "
                f"{type(self.generator).__name__}"
            )

    @property
    def takes_all(self) -> bool:
        return self.rate == 1

    def choose(self, exchange: "Exchange", local_class: Tensor, num_classes: int) -> Sample | None:
        if self.takes_all:
            return None
        if self.generator is not None:  # torch.utils.checkpoint resets the default one
            ops.refuse_recomputation("margin_cross_entropy(sampling=PartialFC(generator=))")
        num_sample = max(int(self.rate * num_classes), min(local_class.shape[0], num_classes))
        return Sample(sample_classes(local_class, num_classes, num_sample, self.generator))

    def described(self) -> str:
        return f"PartialFC(rate={self.rate}, logq={self.logq})"


@dataclass(frozen=True)
class ChosenBy(Sampling):
    """Computes each step on the classes that a function chooses.

    Args:
        function: maps the rows' classes (N,), -1 where ``w`` does not hold the class, to sorted
            rows of ``w``, at least one. They include the rows' own classes. On a GPU a bad sample
            gives the loss NaN, as a bad label does.
        logq: as for :class:`PartialFC`, as if the function chose at random.
    """

    function: Callable[[Tensor], Tensor]
    logq: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(
                f"function: expected a function of labels, got {type(self.function).__name__}"
            )
        arguments.boolean("logq", self.logq)

    def choose(self, exchange: "Exchange", local_class: Tensor, num_classes: int) -> Sample:
        # the exchange says whether the host may wait, and raises one rank's error on all
        sample = exchange.attempt(
            _checked, self.function, local_class, num_classes, bool(exchange.check_w)
        )
        if sample is None:
            every = torch.arange(num_classes, device=local_class.device)
            return Sample(every, local_class.new_zeros((), dtype=torch.bool))
        return sample


def sample_classes(
    local_class: Tensor, num_classes: int, num_sample: int, generator: torch.Generator | None = None
) -> Tensor:
    """Chooses num_sample of the classes [0, num_classes), sorted: the rows' own and random ones.

    Nothing waits for the device, and the size does not depend on values.

    Args:
        local_class: (N,) int64, class of each row or -1.
        num_sample: at least min(N, num_classes), so that all classes of the rows find room.
        generator: on their device; None: torch's default one.
    """
    # random numbers are below 1; a place beyond the classes takes the rows without one
    order = torch.empty(num_classes + 1, dtype=torch.float32, device=local_class.device)
    order.uniform_(generator=generator)
    order.index_fill_(0, torch.where(local_class >= 0, local_class, num_classes), 2.0)
    return order[:num_classes].topk(num_sample, sorted=False).indices.sort().values


def _checked(
    function: Callable[[Tensor], Tensor], local_class: Tensor, num_classes: int, check: bool
) -> Sample:
    """Returns the classes that ``function`` chooses, and whether they are sorted and all there.

    Where they are not, classes that exist take the place of those that do not.

    Raises:
        TypeError, ValueError: a wrong type or shape; with ``check``, for which the host waits, also
            wrong values.
    """
    index = function(local_class)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        came = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"sampling: expected it to return an int64 tensor, got {came}")
    fits = min(1, num_classes) <= index.numel() <= num_classes
    if index.ndim != 1 or not fits:
        raise ValueError(
            f"sampling: expected it to return 1 to {num_classes} indices, got {tuple(index.shape)}"
        )
    if index.device != local_class.device:
        raise ValueError(f"sampling: expected indices on {local_class.device}, got {index.device}")
    inside, sorted_ = (index >= 0) & (index < num_classes), index.diff() > 0
    valid = inside.all() & sorted_.all()
    if check and not bool(valid):
        what, wrong = f"indices in [0, {num_classes})", index[~inside]
        if len(wrong) == 0:
            what, wrong = "sorted indices without repetition", index[1:][~sorted_]
        raise ValueError(f"sampling: expected it to return {what}, got {int(wrong[0])}")
    if check:
        missing = local_class[(local_class >= 0) & ~torch.isin(local_class, index)]
        if len(missing) > 0:
            raise ValueError(
                "sampling: expected the classes of the rows among its indices, but class "
                f"{int(missing[0])} is missing"
            )
    # kernels write to the rows of a sample: where it is bad, to rows that are there
    rows = torch.arange(index.shape[0], device=index.device)
    return Sample(torch.where(valid, index, rows), valid)


def sampled(
    num_classes: int,
    bias: Tensor | None,
    local_class: Tensor,
    index: Tensor,
    logq: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Returns the bias of the classes ``index``, and the position of each row's class among them.

    The bias includes the logq correction, in ``dtype``. The position is -1 where the class is not
    among them.
    """
    num_sample = index.shape[0]
    if num_sample == 0:  # a rank without classes
        return torch.zeros(0, dtype=dtype, device=index.device) if logq else bias, local_class
    places = torch.searchsorted(index, local_class).clamp_max(num_sample - 1)
    owned = index[places] == local_class
    bias = None if bias is None else bias.index_select(0, index)
    if logq:
        of_rows = torch.zeros(num_sample + 1, dtype=torch.bool, device=index.device)
        held = torch.where(owned, places, num_sample).flatten()
        of_rows = of_rows.index_fill_(0, held, True)[:-1]
        positives = of_rows.sum().to(dtype)
        log_pi = torch.log((num_sample - positives) / (num_classes - positives))
        correction = torch.where(of_rows, 0, -log_pi)  # 0 / 0 where all are positives
        bias = correction if bias is None else bias + correction
    return bias, torch.where(owned, places, -1)


def step_generators(group: dist.ProcessGroup | None) -> StepGenerators:
    """Makes the generators of a head's samples, from a seed that the ranks agree on."""
    return StepGenerators(random_seed(group), "MarginSoftmaxHead(sampling=)")
