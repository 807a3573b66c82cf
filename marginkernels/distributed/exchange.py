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
of five integers per rank tells the numbers of rows, whether the ranks' settings agree, and whether
one of them found bad input, which all then raise. The host waits for it, so it is left out where
the numbers of rows are promised (``even_batches``, ``max_local_batch``) and values are not checked,
as on a GPU. N numbers each are gathered for sample weights, row margins and random
margins; a learnable scale all-reduces one number backward; a loss that needs the target's cosine
before its sweep all-reduces N numbers, and an adaptive scale with a sweep of its own merges that.
In bytes a rank sends, and receives, at most

    N D e (gather) + 8 N (labels) + 4 r W N (merge, r rows) + N D e (reduce-scatter), e = 2 or 4,

and the part (W - 1) / W of that in a ring. Nothing depends on the number of classes.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import ops, validation
from ..autograd import first_derivative_only
from .shard import ClassShard, raise_together, require_agreement, require_same

# new names since torch 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")


def opened(
    shard: ClassShard | None,
    x: Tensor,
    w: Tensor,
    check: Callable[[], T],
    agreed: Callable[[T], dict],
    wants_stats: bool = False,
) -> tuple["Whole | Exchange", T]:
    """The exchange of one call, and what ``check()`` returns.

    Args:
        check: raises what is wrong with this rank's arguments.
        agreed: from the result of ``check`` the values that are the same on all ranks, by name.
    """
    if shard is None:
        return Whole(x, wants_stats), check()
    if not isinstance(shard, ClassShard):
        raise TypeError(f"shard: expected a ClassShard or None, got {type(shard).__name__}")
    checked, error = None, None
    try:
        checked = check()
    except Exception as raised:
        error = raised
    return Exchange(shard, x, w, wants_stats, error, lambda: agreed(checked)), checked


class Whole:
    """All classes and rows are in this process: what :class:`Exchange` does, for one."""

    def __init__(self, x: Tensor, wants_stats: bool = False):
        self.x, self.wants_stats = x, wants_stats

    @property
    def check(self) -> str:
        return "raise" if validation.checks_values(self.x.device) else ""

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        return x

    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        return values

    def of_own_rows(self, own: Tensor, function, every: Tensor, *args) -> Tensor:
        return own

    def scale(self, scale: Tensor, learns: bool) -> Tensor:
        return scale

    def held(self, label: Tensor) -> Tensor:
        return label

    def total(self, values: Tensor) -> Tensor:
        return values

    def attempt(self, function, *args):
        return function(*args)

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
        w: this rank's classes, on the group's device even where x is not.
        wants_stats: whether this rank wants statistics; ``wants_stats`` is then whether any does.
        error: what this rank found wrong with its arguments: it is raised on all ranks.
        agreed: gives what has to be the same on all ranks, where they compare it; compared, and
            shown, as strings.
    """

    def __init__(
        self,
        shard: ClassShard,
        x: Tensor,
        w: Tensor | None = None,
        wants_stats: bool = False,
        error: Exception | None = None,
        agreed: Callable[[], dict] = dict,
    ):
        self.shard, self.group, self.error = shard, shard.group, error
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.factor = self.world if shard.grad_scale == "ddp" else 1
        self.device = _device(self.group, w, x)
        self.check = "mark" if validation.checks_values(self.device) else ""  # all raise, or none
        self.n, height = 0 if error else x.shape[0], shard.max_local_batch
        if height is not None and self.n > height:
            self.error = ValueError(
                f"x: expected at most max_local_batch={height} rows, got {self.n}"
            )
        self.height = height or max(self.n, 1)  # an empty message may be an error
        self.index = None  # of the rows among the padded ones, where some are padding
        self.wants_dx, self.wants_stats = True, wants_stats
        promised = shard.even_batches or height is not None
        if self.check or not promised:
            sizes, wants_dx = self._agree(x, agreed)
            if not promised:
                self._place(sizes)
                self.wants_dx = wants_dx
        elif self.error is not None:
            raise self.error
        if self.index is None:
            self.first = self.rank * self.height
        self.wants_dx = self.wants_dx and torch.is_grad_enabled()

    def _agree(self, x: Tensor, agreed: Callable[[], dict]) -> tuple[list[int], bool]:
        """Tells the others what this rank has and wants; the host waits. The ranks' numbers of
        rows, and whether any wants dx.
        """
        failed, settings = self.error is not None, {}
        if not failed:
            settings = {"x": f"{x.shape[1]} features of {x.dtype}"} | agreed()
        settings = {name: str(value) for name, value in settings.items()}
        wants_dx = not failed and x.requires_grad
        mine = [failed, self.n, wants_dx, self.wants_stats, _fingerprint(settings)]
        mine = torch.tensor(mine, dtype=torch.int64).to(self.device)
        every = self._gather(mine).view(self.world, -1).tolist()
        failed, sizes, wants_dx, wants_stats, fingerprints = zip(*every, strict=True)
        if any(failed):
            raise_together(self.group, self.error)
        if len(set(fingerprints)) > 1:
            require_agreement(self.group, **settings)
        if self.shard.even_batches:
            require_same("x", [f"{size} rows (even_batches=True)" for size in sizes])
        self.wants_stats = any(wants_stats)
        return sizes, any(wants_dx)

    def _place(self, sizes: list[int]) -> None:
        """Where the ranks' rows are among all."""
        self.height = max(*sizes, 1)
        if any(size != self.height for size in sizes):
            starts = range(0, self.world * self.height, self.height)
            rows = [torch.arange(a, a + size) for a, size in zip(starts, sizes, strict=True)]
            self.index = torch.cat(rows).to(self.device)
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

    def of_own_rows(self, own: Tensor, function, every: Tensor, *args) -> Tensor:
        """function(every, *args), (N,), with the gradient of ``own``, this rank's part of it."""
        return _Rows.apply(own, function(every.detach(), *args), self)

    def scale(self, scale: Tensor, learns: bool) -> Tensor:
        """The scale for the sweep, of which each rank has only its own classes' gradient.

        ``learns`` says whether it may be trained, on any rank.
        """
        if not learns:
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

    def attempt(self, function, *args):
        """function(*args), or None where it raises and values are checked: :meth:`merge`, given
        NaN, then raises the error on all ranks.
        """
        if not self.check:
            return function(*args)
        try:
            return function(*args)
        except Exception as raised:
            self.error = raised
            return None

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


def _device(group: dist.ProcessGroup, *tensors) -> torch.device:
    """The device of the first tensor that the group can exchange, else the group's own."""
    kinds = [device.type for device in group._device_types]
    devices = [t.device for t in tensors if isinstance(t, Tensor) and t.device.type in kinds]
    return devices[0] if devices else torch.device(kinds[0])


def _fingerprint(values: dict[str, str]) -> int:
    """64 bits, the same in every process for the same values."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Features(torch.autograd.Function):
    """All-gather of rows; backward reduce-scatter of their gradients."""

    @staticmethod
    def forward(
        ctx, x: Tensor, anchor: Tensor | None, exchange: Exchange, sent_as: torch.dtype
    ) -> Tensor:
        ctx.exchange = exchange
        return exchange._every(x.to(sent_as)).to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, grad: Tensor):
        dx = ctx.exchange._scatter_sum(grad).mul_(ctx.exchange.factor)
        return dx if ctx.needs_input_grad[0] else None, None, None, None


class _Rows(torch.autograd.Function):
    """Numbers of all rows; their gradient is the same on all ranks, each has that of its own."""

    @staticmethod
    def forward(ctx, own: Tensor, every: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return every.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, grad: Tensor):
        exchange = ctx.exchange
        return exchange.factor * grad[exchange.first : exchange.first + exchange.n], None, None


class _Summed(torch.autograd.Function):
    """The value itself; backward the sum over the ranks."""

    @staticmethod
    def forward(ctx, value: Tensor, anchor: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return value.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, grad: Tensor):
        return ctx.exchange.total(grad), None, None


class _Merge(torch.autograd.Function):
    """Forward one all-gather, backward none: all ranks have the same gradients."""

    @staticmethod
    def forward(ctx, exchange, label, lse, logit_sum, logit_max, *owned):
        if exchange.shard.size == 0:  # the sweep was over a stand-in
            lse, logit_max = (torch.full_like(t, -torch.inf) for t in (lse, logit_max))
            logit_sum = torch.zeros_like(logit_sum)
        if exchange.error is not None:
            lse = torch.full_like(lse, torch.nan)
        parts = [lse, logit_sum, logit_max, *owned]
        packed = torch.cat(parts)
        every = exchange._gather(packed).view(exchange.world, len(packed))
        lses, sums, maxima, *owned = every.split([len(part) for part in parts], dim=1)
        merged = lses.logsumexp(0)
        if exchange.check and bool(merged.isnan().any()):
            bad_w = ValueError(ops.BAD_W) if bool(lse.isnan().any()) else None
            raise_together(exchange.group, exchange.error or bad_w)
        ctx.save_for_backward(label, lse, merged)
        maximum = maxima.amax(0)
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return merged, sums.sum(0), maximum, *[values.sum(0) for values in owned]

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, grad_lse, grad_sum, _, *grads_owned):
        label, lse, merged = saved
        if grad_lse is not None:
            share = torch.where(lse == -torch.inf, 0, (lse - merged).exp())
            grad_lse = grad_lse * share
        # backends look no further than the owner, but choose an exponent for fp16 by the largest
        grads_owned = [None if g is None else torch.where(label >= 0, g, 0) for g in grads_owned]
        return None, None, grad_lse, grad_sum, None, *grads_owned
