# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the parts of insightface's Partial FC that trainers with a head of their own import.

``DistCrossEntropy`` takes logits that exist: :class:`insightface.PartialFC_V2` does without both.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autograd import first_derivative_only
from ..distributed.shard import in_group

LEAST_PROBABILITY = 1e-30  # insightface takes -log(max(p, 1e-30))


class _CrossEntropy(torch.autograd.Function):
    """Computes the mean cross-entropy of logits whose columns are split over the ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        greatest = _over_ranks(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
        share = (logits - greatest).exp_()
        share /= _over_ranks(share.sum(1, keepdim=True), dist.ReduceOp.SUM)
        column, here = labels.clamp_min(0), (labels >= 0).to(share.dtype)
        target = _over_ranks(share.gather(1, column) * here, dist.ReduceOp.SUM)
        ctx.save_for_backward(share, column, here)
        return -target.clamp_min(LEAST_PROBABILITY).log().sum() / max(len(logits), 1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        share, column, here = saved
        return share.scatter_add(1, column, -here).mul_(grad / max(len(share), 1)), None


class DistCrossEntropy(nn.Module):
    """Computes the mean cross-entropy of logits whose columns are split over the default group.

    The gradient is that of all ranks' mean, and disregards that a loss ends at 69.08. No argument
    is overwritten, while insightface's has the probabilities in place of the logits. Without a
    group there is one rank.
    """

    def forward(self, logit_part: Tensor, label_part: Tensor) -> Tensor:
        """Returns the mean loss, the same on all ranks; 0 where there are no rows.

        Args:
            logit_part: (N, C_local), all ranks' rows and this rank's classes.
            label_part: (N, 1) or (N,), the columns of the rows' classes, -1 where another rank has
                the class.
        """
        if logit_part.ndim != 2:
            raise ValueError(
                f"logit_part: expected shape (N, C_local), got {tuple(logit_part.shape)}"
            )
        if label_part.numel() != len(logit_part):
            raise ValueError(
                f"label_part: expected shape ({len(logit_part)}, 1), got {tuple(label_part.shape)}"
            )
        return _CrossEntropy.apply(logit_part, label_part.reshape(-1, 1).long())


class _AllGather(torch.autograd.Function):
    """Gathers a tensor of every rank, and sums the ranks' gradients of this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *gather_list: Tensor) -> tuple[Tensor, ...]:
        if in_group():
            dist.all_gather(list(gather_list), tensor.contiguous())
        else:
            gather_list[0].copy_(tensor)
        return gather_list

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
        rank = dist.get_rank() if in_group() else 0
        own = _over_ranks(torch.stack(grads), dist.ReduceOp.SUM)[rank]
        return own * len(grads), *[None] * len(grads)


def AllGather(tensor: Tensor, *gather_list: Tensor) -> tuple[Tensor, ...]:  # noqa: N802
    """Returns the tensors of all ranks of the default group, this rank's own with its gradient.

    Backward sums the ranks' gradients of the tensor and multiplies them by the number of ranks, by
    which DistributedDataParallel divides them.

    Args:
        tensor: this rank's, of the same shape on every rank.
        gather_list: a tensor for each rank, which the call fills.
    """
    world = dist.get_world_size() if in_group() else 1
    if len(gather_list) != world:
        raise ValueError(
            f"gather_list: expected a tensor for each of {world} ranks, got {len(gather_list)}"
        )
    return _AllGather.apply(tensor, *gather_list)


def _over_ranks(values: Tensor, operation: Any) -> Tensor:
    """Returns the values reduced over the default group in place, where there is one."""
    if in_group():
        dist.all_reduce(values, operation)
    return values
