# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""What a step exchanges where the classes are split over the ranks of a group.

Every rank holds some classes and gives some rows. A step of N rows in all, over W ranks, is

    forward   all-gather of the features, N D numbers in their type, and of the N labels;
              the sweep over the rank's own classes;
              one all-gather of the packed rows (lse, d, |w_y|; with a bias its b_y, with smoothing
              S, with statistics the maximum), 3 to 6 numbers in fp32 per row and rank;
    backward  the sweep; one reduce-scatter of dx, N D numbers in x's type, or in fp32 where x is
              not normalised.

and each rank then holds the same N numbers and computes the same loss from them. Besides, a gather
of seven integers per rank tells the numbers of rows, unless they are promised (``even_batches``,
``max_local_batch``); N numbers each are gathered for sample weights, row margins and random
margins; a learnable scale all-reduces one number backward; a loss that needs the target's cosine
before its sweep all-reduces N numbers, and an adaptive scale with a sweep of its own merges that.
In bytes a rank sends, and receives, at most

    N D e (gather) + 8 N (labels) + 4 r W N (merge, r rows) + N D e (reduce-scatter), e = 2 or 4,

and the part (W - 1) / W of that in a ring. Nothing depends on the number of classes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, validation
from .distributed import ClassShard, require_same

# new names since torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Whole:
    """All classes and rows are in this process: what :class:`Exchange` does, for one."""

    def __init__(self, x: Tensor):
        self.check = "raise" if validation.checks_values(x) else ""

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        return x

    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        return values

    def of_own_rows(self, function, own: Tensor, every: Tensor, *args) -> Tensor:
        return function(own, *args)

    def scale(self, scale: Tensor) -> Tensor:
        return scale

    def held(self, label: Tensor) -> Tensor:
        return label

    def total(self, values: Tensor) -> Tensor:
        return values

    def merge(self, label: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs

    def candidates(self, k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        return values, classes


class Exchange:
    """What one call exchanges over the group of its shard. Made, and used, in the same order on
    all ranks.

    Args:
        shard: what this rank holds.
        x: (n, D), this rank's rows.
        learns_scale: whether s may be trained; the same on all ranks.
        given: what the call has on this rank, and has to have on all ranks or on none.
    """

    def __init__(self, shard: ClassShard, x: Tensor, learns_scale: bool = False, **given: bool):
        self.shard, self.group = shard, shard.group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.factor = self.world if shard.grad_scale == "ddp" else 1
        self.n, self.height = x.shape[0], max(x.shape[0], 1)  # an empty message may be an error
        self.index = None  # of the rows among the padded ones, where some are padding
        self.check = "mark" if validation.checks_values(x) else ""  # all ranks raise, or none
        self.wants_dx, self.learns_scale = True, learns_scale
        if shard.max_local_batch is not None:
            self.height = shard.max_local_batch
            if self.n > self.height:
                raise ValueError(
                    f"x: expected at most max_local_batch={self.height} rows, got {self.n}"
                )
        self.first = self.rank * self.height
        if not (shard.even_batches or shard.max_local_batch):
            self._agree(x, given)
        self.wants_dx = self.wants_dx and torch.is_grad_enabled()

    def _agree(self, x: Tensor, given: dict[str, bool]) -> None:
        """Tells the others how many rows this rank has and what it wants; the host waits."""
        mine = [self.n, x.shape[1], _DTYPES.index(x.dtype), x.requires_grad, *given.values()]
        mine = torch.tensor(mine, dtype=torch.int64)
        every = self._gather(mine.to(x.device)).view(self.world, -1).tolist()
        sizes, widths, dtypes, dx, *options = zip(*every, strict=True)
        require_same("x", [f"{width} features" for width in widths])
        require_same("x", [str(_DTYPES[dtype]) for dtype in dtypes])
        for name, present in zip(given, options, strict=True):
            if len(set(present)) > 1:
                ranks = [rank for rank, there in enumerate(present) if there]
                raise ValueError(f"{name}: expected on all ranks or on none, got it on {ranks}")
        self.wants_dx = any(dx)
        self.height = max(*sizes, 1)
        self.first = self.rank * self.height
        if any(size != self.height for size in sizes):
            starts = range(0, self.world * self.height, self.height)
            rows = [torch.arange(a, a + size) for a, size in zip(starts, sizes, strict=True)]
            self.index = torch.cat(rows).to(x.device)
            self.first = sum(sizes[: self.rank])

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        """x (N, D) of all ranks. Backward: their dx summed, the own rows of it.

        ``sent_as`` is a type that holds the numbers of x too; dx is exchanged in x's type.
        """
        # a rank that wants no dx still sums with those that do
        anchor = torch.zeros((), device=x.device, requires_grad=True) if self.wants_dx else None
        return _Features.apply(x if self.wants_dx else x.detach(), anchor, self, sent_as or x.dtype)

    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        """Numbers (N,) of the rows of all ranks. Backward: the own rows."""
        every = self._every(values.detach(), fill)
        return _Rows.apply(values, every, self) if values.requires_grad else every

    def of_own_rows(self, function, own: Tensor, every: Tensor, *args) -> Tensor:
        """function(every, *args), (N,), with the gradient of function(own, *args)."""
        return _Rows.apply(function(own, *args), function(every.detach(), *args), self)

    def scale(self, scale: Tensor) -> Tensor:
        """The scale for the sweep, of which each rank has only its own classes' gradient."""
        if not self.learns_scale:
            return scale
        return _Summed.apply(scale, torch.zeros_like(scale, requires_grad=True), self)

    def held(self, label: Tensor) -> Tensor:
        """Labels as classes of this rank's, -1 where another holds the class."""
        here = (label >= self.shard.start) & (label < self.shard.stop)
        return torch.where(here, label - self.shard.start, -1)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, without gradient."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values

    def merge(
        self, label: Tensor, lse: Tensor, logit_sum: Tensor, logit_max: Tensor, *owned: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs of the ranks' sweeps as of one sweep over all classes.

        ``owned`` are 0 on the ranks that do not hold the row's class; ``label`` is -1 there.
        """
        return _Merge.apply(self, label, lse, logit_sum, logit_max, *owned)

    def candidates(self, k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """From each rank's at most k values of all rows, and their classes: the values of all ranks
        for the own rows, (n, W k).
        """
        missing = [0, k - values.shape[1]]
        own = []
        for rows in (F.pad(values, missing, value=-torch.inf), F.pad(classes, missing)):
            every = self._gather(rows).view(self.world, *rows.shape)
            own.append(every[:, self.first : self.first + self.n].transpose(0, 1).flatten(1))
        return tuple(own)

    def _gather(self, values: Tensor) -> Tensor:
        """Those of each rank, one after another along the first dimension."""
        every = values.new_empty(self.world * values.shape[0], *values.shape[1:])
        _all_gather(every, values.contiguous(), group=self.group)
        return every

    def _every(self, rows: Tensor, fill: float = 0) -> Tensor:
        """Rows of all ranks, (N, ...): without padding where the numbers of rows are known."""
        padding = [0, 0] * (rows.ndim - 1) + [0, self.height - self.n]
        every = self._gather(F.pad(rows, padding, value=fill) if padding[-1] else rows)
        return every if self.index is None else every[self.index]

    def _scatter_sum(self, rows: Tensor) -> Tensor:
        """From each rank's (N, D): the sum over the ranks, of this rank's rows."""
        if self.index is not None:
            padded = rows.new_zeros(self.world * self.height, *rows.shape[1:])
            rows = padded.index_copy_(0, self.index, rows)
        mine = rows.new_empty(self.height, *rows.shape[1:])
        _reduce_scatter(mine, rows.contiguous(), group=self.group)
        return mine[: self.n]


class _Features(torch.autograd.Function):
    """All-gather of rows; backward reduce-scatter of their gradients."""

    @staticmethod
    def forward(
        ctx, x: Tensor, anchor: Tensor | None, exchange: Exchange, sent_as: torch.dtype
    ) -> Tensor:
        ctx.exchange = exchange
        return exchange._every(x.to(sent_as)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dx = ctx.exchange._scatter_sum(grad).mul_(ctx.exchange.factor)
        return dx if ctx.needs_input_grad[0] else None, None, None, None


class _Rows(torch.autograd.Function):
    """Numbers of all rows; their gradient is the same on all ranks, each has that of its own."""

    @staticmethod
    def forward(ctx, own: Tensor, every: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return every.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        exchange = ctx.exchange
        return exchange.factor * grad[exchange.first : exchange.first + exchange.n], None, None


class _Summed(torch.autograd.Function):
    """The value itself; backward the sum over the ranks."""

    @staticmethod
    def forward(ctx, value: Tensor, anchor: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.exchange.total(grad), None, None


class _Merge(torch.autograd.Function):
    """Forward one all-gather, backward none: all ranks have the same gradients."""

    @staticmethod
    def forward(ctx, exchange, label, lse, logit_sum, logit_max, *owned):
        if exchange.shard.size == 0:  # the sweep was over a stand-in
            lse, logit_max = (torch.full_like(t, -torch.inf) for t in (lse, logit_max))
            logit_sum = torch.zeros_like(logit_sum)
        parts = [lse, logit_sum, logit_max, *owned]
        packed = torch.cat(parts)
        every = exchange._gather(packed).view(exchange.world, len(packed))
        lses, sums, maxima, *owned = every.split([len(part) for part in parts], dim=1)
        merged = lses.logsumexp(0)
        if exchange.check:
            merged = ops.checked(merged, merged, -torch.inf, torch.inf, ops.BAD_W)
        ctx.save_for_backward(label, lse, merged)
        maximum = maxima.amax(0)
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return merged, sums.sum(0), maximum, *[values.sum(0) for values in owned]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse, grad_sum, _, *grads_owned):
        label, lse, merged = ctx.saved_tensors
        if grad_lse is not None:
            share = torch.where(lse == -torch.inf, 0, (lse - merged).exp())
            grad_lse = grad_lse * share
        # backends look no further than the owner, but choose an exponent for fp16 by the largest
        grads_owned = [None if g is None else torch.where(label >= 0, g, 0) for g in grads_owned]
        return None, None, grad_lse, grad_sum, None, *grads_owned
