# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Exchanges what a step needs where the classes are split over the ranks of a group.

Every rank holds some classes and gives some rows. A step of N rows in all, over W ranks, is

    forward   all-gather of the features, N D numbers in their type, and of the N labels;
              the sweep over the rank's own classes;
              one all-gather of the packed rows (lse, target_cosine, w_norm; with smoothing
              logit_sum, with statistics logit_max, with a bias bias_y), 3 to 6 numbers in fp32
              per row and rank;
    backward  the sweep; one reduce-scatter of dx, N D numbers in x's type, or in fp32 where x is
              not normalised.

Each rank then holds the same N numbers and computes the same loss from them.

Besides, the ranks gather five integers each: they tell the numbers of rows, whether the ranks'
settings agree, and whether a rank found bad input, which all ranks then raise. The host waits for
them. So a step leaves them out where the numbers of rows are promised (``even_batches``,
``max_local_batch``) and values are not checked, as on a GPU.

Some options add to this. Sample weights, row margins and random margins gather N numbers each. A
learnable scale all-reduces one number backward. A loss that needs the target's cosine before its
sweep all-reduces N numbers, and one that reads the k greatest cosines of a row gathers k N. An
adaptive scale with a sweep of its own merges that sweep too.

In bytes a rank sends, and receives, at most

    N D e (gather) + 8 N (labels) + 4 r W N (merge, r rows) + N D e (reduce-scatter), e = 2 or 4,

and the part (W - 1) / W of that in a ring. Nothing depends on the number of classes.
"""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import device_checks
from ..results import SweepResult
from . import collectives
from .base import Exchange, Whole
from .collectives import RowLayout, gather
from .one_gather import is_known, once
from .shard import ClassShard, raise_together, require_agreement, require_same

T = TypeVar("T")


def opened(
    shard: ClassShard | None,
    x: Tensor,
    w: Tensor,
    check: Callable[[], T],
    agreed: Callable[[T], dict[str, Any]],
    wants_stats: bool = False,
) -> tuple["Exchange", T]:
    """Returns the exchange of one call, and what ``check()`` returns.

    Args:
        check: raises what is wrong with this rank's arguments.
        agreed: from the result of ``check`` the values that are the same on all ranks, by name.
    """
    checked: Any = None
    if shard is None:
        checked = check()
        return Whole(x, wants_stats), checked
    if torch.compiler.is_compiling() and isinstance(shard, ClassShard) and shard.even_batches:
        checked = check()
        return Traced(shard, x, wants_stats), checked
    return _opened_split(shard, x, w, check, agreed, wants_stats)


# as torch.compiler.disable, which imports the compiler at once
@torch._disable_dynamo
def _opened_split(
    shard: ClassShard,
    x: Tensor,
    w: Tensor,
    check: Callable[[], T],
    agreed: Callable[[T], dict[str, object]],
    wants_stats: bool,
) -> tuple["Exchange", T]:
    if not isinstance(shard, ClassShard):
        raise TypeError(f"shard: expected a ClassShard or None, got {type(shard).__name__}")
    error = None
    try:
        checked = check()
    except Exception as raised:
        error = raised
    return Sharded(shard, x, w, wants_stats, error, lambda: agreed(checked)), checked


class Split(Exchange):
    """Exchanges over the group of a shard, however the ranks came to agree on the call."""

    is_split = True
    shard: ClassShard
    group: dist.ProcessGroup
    error: Exception | None  # what this rank found wrong, for :meth:`merge` to raise on all ranks
    wants_dx: bool  # whether backward exchanges the gradient of the features
    factor: int  # of that gradient
    layout: RowLayout

    def _anchor(self, operand: Tensor) -> Tensor | None:
        """Returns what makes this rank take part in a backward that only others want."""
        raise NotImplementedError

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        # a rank that wants no dx still sums with those that do
        anchor = self._anchor(x) if self.wants_dx else None
        return collectives.GatherFeatures.apply(
            x if self.wants_dx else x.detach(), anchor, self.layout, self.factor, sent_as or x.dtype
        )

    def rows(self, values: Tensor, fill: float = 0) -> Tensor:
        every = self.layout.every(values.detach(), fill)
        return self._through_own(values, every) if values.requires_grad else every

    def own(self, values: Tensor) -> Tensor:
        return values[self.layout.own]

    def of_own_rows(
        self, own: Tensor, function: Callable[..., Tensor], every: Tensor, *args: Any
    ) -> Tensor:
        return self._through_own(own, function(every.detach(), *args))

    def _through_own(self, own: Tensor, every: Tensor) -> Tensor:
        return collectives.ReplaceByBatch.apply(own, every, self.layout, self.factor)

    def total(self, values: Tensor) -> Tensor:
        return collectives.summed(self.group, values)

    def scale(self, scale: Tensor, learns: bool) -> Tensor:
        if not learns:
            return scale
        return collectives.SumGradients.apply(scale, self._anchor(scale), self.group)

    def merge(
        self, position: Tensor, result: SweepResult, one_versus_rest: bool = False
    ) -> SweepResult:
        given = [t for t in result if t is not None]  # bias_y, the last, may be None
        merged = collectives.MergeResults.apply(
            self.group, self.shard.size > 0, self.check_w == "mark", self.error, one_versus_rest,
            position, *given,
        )  # fmt: skip
        return SweepResult(*merged)

    def greatest(self, values: Tensor) -> Tensor:
        every = gather(self.group, values)  # (W, N, k)
        return every.transpose(0, 1).flatten(1).topk(values.shape[1], dim=1).values

    def candidates(self, k: int, values: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        missing = [0, k - values.shape[1]]
        values, classes = F.pad(values, missing, value=-torch.inf), F.pad(classes, missing)
        return self._of_all_ranks(values), self._of_all_ranks(classes)

    def _of_all_ranks(self, found: Tensor) -> Tensor:
        """Returns what all ranks found for this rank's rows, (n, W k), from this rank's (N, k)."""
        every = gather(self.group, found)
        return every[:, self.layout.own].transpose(0, 1).flatten(1)


class Sharded(Split):
    """Exchanges over the group of a shard what one call needs.

    Args:
        shard: the classes of this rank.
        x: (n, D), this rank's rows.
        w: this rank's classes, on the group's device even where x is not.
        wants_stats: whether this rank wants statistics. The attribute says whether any rank does.
        error: what this rank found wrong with its arguments; all ranks raise it.
        agreed: gives the values that have to be the same on all ranks. The ranks compare them, and
            errors show them, as strings.
    """

    def __init__(
        self,
        shard: ClassShard,
        x: Tensor,
        w: Tensor | None = None,
        wants_stats: bool = False,
        error: Exception | None = None,
        agreed: Callable[[], dict[str, Any]] = dict,
    ):
        self.shard, self.group, self.error = shard, shard.group, error
        self.first_class = shard.start
        self.factor = factor_of(shard)
        self.device = _device(self.group, w, x)
        # ranks raise together, or none does
        self.check_w = "mark" if device_checks.checks_values(self.device) else ""
        n, height = 0 if error else x.shape[0], shard.max_local_batch
        if height is not None and n > height:
            self.error = ValueError(f"x: expected at most max_local_batch={height} rows, got {n}")
        self.wants_dx, self.wants_stats = True, wants_stats
        promised = shard.even_batches or height is not None
        sizes = None
        if self.check_w or not promised:
            sizes, wants_dx = self._agree(n, x, agreed)
            if promised:
                sizes = None  # the padding stays, as where ranks do not tell their numbers
            else:
                height, self.wants_dx = max(*sizes, 1), wants_dx
        elif self.error is not None:
            raise self.error
        self.layout = RowLayout(self.group, n, height or max(n, 1), sizes, self.device)
        self.wants_dx = self.wants_dx and torch.is_grad_enabled()

    def _agree(
        self, n: int, x: Tensor, agreed: Callable[[], dict[str, Any]]
    ) -> tuple[list[int], bool]:
        """Tells the other ranks what this rank has and wants; the host waits.

        Returns:
            The ranks' numbers of rows, and whether any rank wants dx.
        """
        failed = self.error is not None
        given = {}
        if not failed:
            known = ", of an earlier call" if is_known(x) else ""
            given["x"] = f"{x.shape[1]} features of {x.dtype}{known}"
            given["shard"] = f"{self.shard.total} classes, grad_scale={self.shard.grad_scale!r}"
            given |= agreed()
        settings = {name: str(value) for name, value in given.items()}
        wants_dx = not failed and x.requires_grad
        mine = [failed, n, wants_dx, self.wants_stats, _fingerprint(settings)]
        every = gather(self.group, torch.tensor(mine, dtype=torch.int64).to(self.device)).tolist()
        have_failed, sizes, want_dx, want_stats, fingerprints = zip(*every, strict=True)
        if any(have_failed):
            raise_together(self.group, self.error)
        if len(set(fingerprints)) > 1:
            require_agreement(self.group, **settings)
        if self.shard.even_batches:
            require_same("x", [f"{size} rows (even_batches=True)" for size in sizes])
        self.wants_stats = any(want_stats)
        return list(sizes), any(want_dx)

    def features(self, x: Tensor, sent_as: torch.dtype | None = None) -> Tensor:
        key = (self.group, self.wants_dx, self.layout.height, self.factor, sent_as or x.dtype)
        return once(x, key, lambda: super(Sharded, self).features(x, sent_as))

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        if not self.check_w:
            return function(*args)
        try:
            return function(*args)
        except Exception as raised:
            self.error = raised
            return None

    def _anchor(self, operand: Tensor) -> Tensor | None:
        """Returns what makes a rank take part in backward that wants no gradient of its own."""
        return torch.zeros((), device=operand.device, requires_grad=True)


class Traced(Split):
    """Exchanges inside a graph of ``torch.compile``, where ``even_batches`` is promised.

    The ranks compare no settings, and tell each other of no errors: a bad value is an error on its
    own rank. x requires its gradient on all ranks or on none, and so does the scale.
    """

    def __init__(self, shard: ClassShard, x: Tensor, wants_stats: bool):
        self.shard, self.group, self.error = shard, shard.group, None
        self.first_class = shard.start
        self.factor = factor_of(shard)
        self.check_w = "raise" if device_checks.checks_values(x.device) else ""
        self.wants_dx, self.wants_stats = torch.is_grad_enabled(), wants_stats
        n = x.shape[0]
        self.layout = RowLayout(self.group, n, max(n, 1), None, x.device)

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        return function(*args)

    def _anchor(self, operand: Tensor) -> Tensor | None:
        return None  # a graph makes no leaf


def factor_of(shard: ClassShard) -> int:
    """Returns what dx is multiplied by."""
    return dist.get_world_size(shard.group) if shard.grad_scale == "ddp" else 1


def _device(group: dist.ProcessGroup, *tensors: Tensor | None) -> torch.device:
    """Returns the device of the first tensor that the group can exchange, else the group's own."""
    kinds = [device.type for device in group._device_types]
    devices = [t.device for t in tensors if isinstance(t, Tensor) and t.device.type in kinds]
    return devices[0] if devices else torch.device(kinds[0])


def _fingerprint(values: dict[str, str]) -> int:
    """Returns 64 bits that are the same in every process for the same values."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# a graph cannot wait for what the ranks tell each other, and breaks where the classes are split
for _method in Exchange.__abstractmethods__:
    setattr(Sharded, _method, torch._disable_dynamo(getattr(Sharded, _method)))
