# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Partial FC: a step on some of the classes (An et al., 2022, arXiv:2203.15565)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .generators import StepGenerators, random_seed


def sample_classes(
    label: Tensor, num_classes: int, num_sample: int, generator: torch.Generator | None = None
) -> Tensor:
    """num_sample of the classes [0, num_classes), sorted: those of the rows, the rest at random.

    Nothing waits for the device, and the size does not depend on values.

    Args:
        label: (N,) int64, class of each row or -1.
        num_sample: at least min(N, num_classes), so that all classes of the rows find room.
        generator: on label's device; None: torch's default one.
    """
    # random numbers are below 1; a place beyond the classes takes the rows without one
    order = torch.empty(num_classes + 1, dtype=torch.float32, device=label.device)
    order.uniform_(generator=generator)
    order.index_fill_(0, torch.where(label >= 0, label, num_classes), 2.0)
    return order[:num_classes].topk(num_sample, sorted=False).indices.sort().values


def uniform(
    num_classes: int, sample_rate: float, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """:func:`sample_classes` of max(int(rate C), min(N, C)) classes, a function of the labels."""

    def sample(label: Tensor) -> Tensor:
        if generator is not None:  # torch.utils.checkpoint resets the default one
            ops.refuse_recomputation("margin_cross_entropy(generator=)")
        num_sample = max(int(sample_rate * num_classes), min(label.shape[0], num_classes))
        return sample_classes(label, num_classes, num_sample, generator)

    return sample


def checked_index(
    sampler: Callable[[Tensor], Tensor], label: Tensor, num_classes: int, check: bool
) -> tuple[Tensor, Tensor]:
    """The classes that ``sampler`` chooses, and whether they are sorted and all there are, a bool
    () on the device. Where they are not, classes that exist take the place of those that do not.

    Raises:
        TypeError, ValueError: of a wrong type or shape; with ``check``, for which the host waits,
            also of wrong values.
    """
    index = sampler(label)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        came = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"sampler: expected it to return an int64 tensor, got {came}")
    if index.ndim != 1 or (index.numel() == 0) != (num_classes == 0):
        raise ValueError(
            f"sampler: expected it to return 1 to {num_classes} indices, got {tuple(index.shape)}"
        )
    if index.device != label.device:
        raise ValueError(f"sampler: expected indices on {label.device}, got {index.device}")
    inside, sorted_ = (index >= 0) & (index < num_classes), index.diff() > 0
    valid = inside.all() & sorted_.all()
    if check and not bool(valid):
        what, wrong = f"indices in [0, {num_classes})", index[~inside]
        if len(wrong) == 0:
            what, wrong = "sorted indices without repetition", index[1:][~sorted_]
        raise ValueError(f"sampler: expected it to return {what}, got {int(wrong[0])}")
    if check:
        missing = label[(label >= 0) & ~torch.isin(label, index)]
        if len(missing) > 0:
            raise ValueError(
                "sampler: expected the classes of the rows among its indices, but class "
                f"{int(missing[0])} is missing"
            )
    return index.clamp(0, max(num_classes - 1, 0)), valid


def sampled(
    w: Tensor,
    bias: Tensor | None,
    label: Tensor,
    index: Tensor,
    logq: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows ``index`` of w, their bias with the logq correction in ``dtype``, the rows' classes
    among them, -1 where the class is missing.
    """
    num_classes, num_sample = w.shape[0], index.shape[0]
    if num_sample == 0:  # a rank without classes
        return w, w.new_zeros(0, dtype=dtype) if logq else bias, label
    places = torch.searchsorted(index, label).clamp_max(num_sample - 1)
    owned = index[places] == label
    w = w.index_select(0, index)
    bias = None if bias is None else bias.index_select(0, index)
    if logq:
        of_rows = torch.zeros(num_sample + 1, dtype=torch.bool, device=w.device)
        of_rows = of_rows.index_fill_(0, torch.where(owned, places, num_sample), True)[:-1]
        positives = of_rows.sum().to(dtype)
        log_pi = torch.log((num_sample - positives) / (num_classes - positives))
        correction = torch.where(of_rows, 0, -log_pi)  # 0 / 0 where all are positives
        bias = correction if bias is None else bias + correction
    return w, bias, torch.where(owned, places, -1)


def chosen(
    exchange,
    sampler: Callable[[Tensor], Tensor],
    w: Tensor,
    bias: Tensor | None,
    label: Tensor,
    logq: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """:func:`sampled` by a sampler of the user's, and whether its sample can be used, a bool () on
    the device. The exchange says whether the host may wait, and raises one rank's error on all.
    """
    index, valid = exchange.attempt(
        checked_index, sampler, label, w.shape[0], bool(exchange.check)
    ) or (torch.arange(w.shape[0], device=w.device), label.new_zeros((), dtype=torch.bool))
    return *sampled(w, bias, label, index, logq, dtype), valid


class Sampler(StepGenerators):
    """Those of a head's samples, from a seed that the ranks agree on."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        seed = [random_seed()]
        if group is not None:
            dist.broadcast_object_list(seed, group=group, group_src=0)
        super().__init__(seed[0], "MarginSoftmaxHead(sample_rate=)")
        self.rank = 0 if group is None else dist.get_rank(group)

    def forward(self, device: torch.device) -> torch.Generator:
        """The generator of the next step."""
        return super().forward(device, self.rank)
