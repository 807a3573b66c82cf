# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Moves rows between the ranks of a group, with the gradients of each move.

:mod:`.exchange` says which of these moves a step makes, and in which order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..autograd import first_derivative_only
from .shard import raise_together

# torch 2.13 renamed these functions
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(group: dist.ProcessGroup, values: Tensor) -> Tensor:
    """Returns the values of all ranks, stacked along a new first dimension."""
    world = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        every = _traced("all_gather_into_tensor", values, world, group.group_name)
    else:
        every = values.new_empty(world * values.shape[0], *values.shape[1:])
        _all_gather(every, values.contiguous(), group=group)
    return every.view(world, *values.shape)


def _traced(name: str, values: Tensor, *args: Any) -> Tensor:
    """Returns the result of a functional collective, which stands in a graph of torch.compile."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(getattr(functional, name)(values.contiguous(), *args))


class RowLayout:
    """Knows where each rank's rows stand in the batch of all ranks, and moves rows accordingly.

    Args:
        group: the ranks.
        n: the number of this rank's rows.
        height: the number of rows that every rank sends, padded to it; at least 1, because an empty
            message may be an error.
        sizes: each rank's number of rows, where the ranks have told each other. The batch then has
            no padding; without ``sizes`` the padding stays in it.
        device: of the rows.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n: int,
        height: int,
        sizes: Sequence[int] | None,
        device: torch.device,
    ):
        self.group, self.n, self.height = group, n, height
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.first = self.rank * height  # of this rank's rows in the batch
        self.index: Tensor | None = None  # of the batch's rows among the padded ones
        if sizes is not None and any(size != height for size in sizes):
            starts = range(0, self.world * height, height)
            rows = [torch.arange(a, a + size) for a, size in zip(starts, sizes, strict=True)]
            self.index = torch.cat(rows).to(device)
            self.first = sum(sizes[: self.rank])

    @property
    def own(self) -> slice:
        """Says where this rank's rows are in the batch."""
        return slice(self.first, self.first + self.n)

    def every(self, rows: Tensor, fill: float = 0) -> Tensor:
        """Returns the batch (N, ...) from each rank's rows (n, ...); ``fill`` is the padding."""
        padding = [0, 0] * (rows.ndim - 1) + [0, self.height - self.n]
        padded = F.pad(rows, padding, value=fill) if padding[-1] else rows
        every = gather(self.group, padded).flatten(0, 1)
        return every if self.index is None else every[self.index]

    def scatter_sum(self, batch: Tensor) -> Tensor:
        """Sums the ranks' (N, D), and returns this rank's rows of the sum, (n, D)."""
        if self.index is not None:
            padded = batch.new_zeros(self.world * self.height, *batch.shape[1:])
            batch = padded.index_copy_(0, self.index, batch)
        if torch.compiler.is_compiling():
            name = self.group.group_name
            mine = _traced("reduce_scatter_tensor", batch, "sum", self.world, name)
        else:
            mine = batch.new_empty(self.height, *batch.shape[1:])
            _reduce_scatter(mine, batch.contiguous(), group=self.group)
        return mine[: self.n]


class GatherFeatures(torch.autograd.Function):
    """Gathers the rows of all ranks; backward reduce-scatters their gradients, times ``factor``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,  # makes a rank whose x wants no gradient take part in backward
        layout: RowLayout,
        factor: int,
        sent_as: torch.dtype,
    ) -> Tensor:
        ctx.layout, ctx.factor = layout, factor
        every = layout.every(x.to(sent_as)).to(x.dtype)
        # torch 2.11 would lose the gradient of what a collective itself returns
        return every.clone() if torch.compiler.is_compiling() else every

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.layout.scatter_sum(grad).mul_(ctx.factor)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, None


class ReplaceByBatch(torch.autograd.Function):
    """Returns the numbers ``every`` of the batch in place of this rank's ``own`` numbers.

    All ranks have the same gradient of the batch: each passes on its own rows, times ``factor``.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, every: Tensor, layout: RowLayout, factor: int) -> Tensor:
        ctx.layout, ctx.factor = layout, factor
        return every.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.factor * grad[ctx.layout.own], None, None, None


class SumGradients(torch.autograd.Function):
    """Returns the value itself; backward sums its gradient over the ranks."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return summed(ctx.group, grad), None, None


def summed(group: dist.ProcessGroup, values: Tensor) -> Tensor:
    """Returns the sum over the ranks, without gradient."""
    if torch.compiler.is_compiling():
        return _traced("all_reduce", values.detach(), "sum", group.group_name)
    values = values.detach().clone()
    dist.all_reduce(values, group=group)
    return values


class MergeResults(torch.autograd.Function):
    """Merges the ranks' sweep results by one gather forward and none backward.

    All ranks have the same gradients of the merged result. So each computes the gradient of its own
    result alone. The tensors come, and leave, in the order of ``SweepResult``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        holds_classes: bool,  # a rank without classes swept a stand-in
        check: bool,  # whether values are checked, for which the host waits
        error: Exception | None,  # of this rank, raised on all where values are checked
        one_versus_rest: bool,  # whether lse is a sum of softplus
        position: Tensor,  # (N,) or (N, L), as all that follows of the targets
        lse: Tensor,
        target_cosine: Tensor,
        w_norm: Tensor,
        logit_sum: Tensor,
        logit_max: Tensor,
        *bias_y: Tensor,
    ) -> tuple[Tensor, ...]:
        if not holds_classes:
            lse = torch.full_like(lse, 0 if one_versus_rest else -torch.inf)
            logit_max = torch.full_like(logit_max, -torch.inf)
            logit_sum = torch.zeros_like(logit_sum)
        if error is not None:
            lse = torch.full_like(lse, torch.nan)
        parts = [lse, target_cosine, w_norm, logit_sum, logit_max, *bias_y]
        packed = torch.cat([part.flatten() for part in parts])
        every = gather(group, packed).split([part.numel() for part in parts], dim=1)
        lses, cosines, norms, sums, maxima, *biases = (
            given.unflatten(1, part.shape) for given, part in zip(every, parts, strict=True)
        )
        merged = lses.sum(0) if one_versus_rest else lses.logsumexp(0)
        if check and bool(merged.isnan().any()):
            bad_w = ValueError(ops.BAD_W) if bool(lse.isnan().any()) else None
            raise_together(group, error or bad_w)
        ctx.save_for_backward(position, *(() if one_versus_rest else (lse, merged)))
        maximum = maxima.amax(0)
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        # only the rank that holds a row's class gives a cosine, a norm and a bias other than 0
        summed_up = [values.sum(0) for values in (cosines, norms, sums)]
        return merged, *summed_up, maximum, *[values.sum(0) for values in biases]

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any,
        saved: tuple[Tensor, ...],
        grad_lse: Tensor | None,
        grad_cosine: Tensor | None,
        grad_norm: Tensor | None,
        grad_sum: Tensor | None,
        _: None,
        *grad_bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        position, *lses = saved
        if grad_lse is not None and lses:
            lse, merged = lses
            share = torch.where(lse == -torch.inf, 0, (lse - merged).exp())
            grad_lse = grad_lse * share

        def of_owner(grad: Tensor | None) -> Tensor | None:
            # backends read the owner's alone, but choose an exponent for fp16 by the greatest
            return None if grad is None else torch.where(position >= 0, grad, 0)

        return (
            None, None, None, None, None, None,
            grad_lse, of_owner(grad_cosine), of_owner(grad_norm), grad_sum, None,
            *map(of_owner, grad_bias),
        )  # fmt: skip
