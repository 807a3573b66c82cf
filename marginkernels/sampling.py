# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Partial FC: a step on some of the classes (An et al., 2022, arXiv:2203.15565)."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .generators import StepGenerators


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
    order = torch.rand(num_classes + 1, generator=generator, device=label.device)
    order.index_fill_(0, torch.where(label >= 0, label, num_classes), 2.0)
    return order[:num_classes].topk(num_sample, sorted=False).indices.sort().values


def uniform(
    num_classes: int, sample_rate: float, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """:func:`sample_classes` of max(int(rate C), min(N, C)) classes, a function of the labels."""

    def sample(label: Tensor) -> Tensor:
        num_sample = max(int(sample_rate * num_classes), min(label.shape[0], num_classes))
        return sample_classes(label, num_classes, num_sample, generator)

    return sample


def sampled(
    w: Tensor,
    bias: Tensor | None,
    label: Tensor,
    index: Tensor,
    logq: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows ``index`` of w, their bias with the logq correction in ``dtype``, the rows' classes
    among them.
    """
    num_classes, num_sample = w.shape[0], index.shape[0]
    owned = label >= 0
    places = torch.searchsorted(index, label.clamp_min(0))
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


class Sampler(StepGenerators):
    """Those of a head's samples, from a seed that the ranks agree on."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        seed = [int(torch.randint(2**62, ()))]
        if group is not None:
            dist.broadcast_object_list(seed, group=group, group_src=0)
        super().__init__(seed[0])
        self.rank = 0 if group is None else dist.get_rank(group)

    def forward(self, device: torch.device) -> torch.Generator:
        """The generator of the next step."""
        return super().forward(device, self.rank)
