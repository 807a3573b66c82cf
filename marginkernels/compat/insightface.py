# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the heads of insightface's arcface_torch: its trainer runs with these imports changed::

    from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2

Unchanged are the signatures, which classes and random numbers a rank has, and the ``state_dict``
with one plain ``weight`` per rank. Gradients are those of the mean loss over the global batch; the
gradient of the embeddings is times the number of ranks. These things differ:

- The loss of a row is not capped at 69.08, unless ``loss_cap=LOSS_CAP`` asks for it.
- Batches may differ in size from step to step and from rank to rank.
- Without a process group there is one rank; insightface demands a group.
- Labels outside [0, num_classes) are an error, not a row that belongs to no class; fractions too,
  and a floating type that does not hold every class.
- ``labels`` stay as they are; insightface squeezes and overwrites them in place.
- Ranks seeded alike start with different weights.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import (
    arguments,
    backends,
    device_checks,
    functional,
    margins,
    numerics,
    ops,
    sampling,
    validation,
)
from ..batch import held
from ..distributed.exchange import Sharded, opened
from ..distributed.shard import ClassShard, in_group, refuse_ddp, require_agreement
from ..generators import rank_generator
from ..norms import row_norm
from ..pages import in_huge_pages
from ..results import SweepResult
from ..update import Update
from .insightface_losses import ArcFace, CombinedMarginLoss, CosFace, MarginLoss
from .insightface_parts import LEAST_PROBABILITY, AllGather, DistCrossEntropy
from .insightface_schedule import PolynomialLRWarmup

__all__ = [
    "LOSS_CAP",
    "AllGather",
    "ArcFace",
    "CombinedMarginLoss",
    "CosFace",
    "DistCrossEntropy",
    "MarginLoss",
    "PartialFC_V2",
    "PolynomialLRWarmup",
]

LOSS_CAP = -math.log(LEAST_PROBABILITY)
_BAD_EMBEDDINGS = "local_embeddings" + ops.BAD_X.removeprefix("x")


class PartialFC_V2(nn.Module):  # noqa: N801
    """Splits the classes over the ranks of the default group as insightface does, each step on a
    sample of them: Partial FC (An et al., 2022, arXiv:2203.15565).

    Rank r of W holds C // W classes, and one more if r < C % W, in the order of the ranks. With
    ``sample_rate`` below 1 a step uses int(sample_rate C_local) of them: the batch's own and others
    as ``torch.rand`` says, or the batch's own alone where they are more than that. The gradient of
    ``weight`` is dense, so that weight decay and momentum of ``torch.optim`` move all classes. An
    optimizer of :mod:`marginkernels.optim`, which needs a :class:`MarginLoss`, moves the sample
    alone.

    After a step ``last_batch_size`` is the number of this rank's rows, and ``weight_index`` has the
    local classes of its sample, None where all classes are taken.

    The head must not be wrapped in DistributedDataParallel: each rank's weight is its own. For the
    same reason a loss scale needs :class:`marginkernels.GradScaler` with the process group.

    Args:
        margin_loss: a :class:`MarginLoss`; or any callable as insightface takes them, with cosines
            (N, C_local) in fp32 and labels (N, 1), local and -1 for other ranks', to scaled logits.
            That works too, in plain PyTorch: the logits exist, and a warning says so.
        embedding_size, num_classes: D and C, of all ranks together.
        sample_rate: see above; 0 uses the batch's own classes alone.
        fp16: whether the linear layer computes in float16, else it does in float32.
        loss_cap: the greatest loss of a row that is reported, or None. Gradients are those without
            it, as in insightface.
        backend: see :func:`marginkernels.margin_cross_entropy`.
    """

    weight_name, transposed = "weight", False  # for optimizers
    bias: nn.Parameter | None = None
    sub_centers = 1
    _update: Update | None = None  # of an optimizer of marginkernels.optim

    def __init__(
        self,
        margin_loss: Callable[..., Tensor],
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        loss_cap: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        _check_margin_loss(margin_loss)
        embedding_size = arguments.integer("embedding_size", embedding_size)
        num_classes = arguments.integer("num_classes", num_classes)
        sample_rate = arguments.number("sample_rate", sample_rate, least=0, most=1)
        if loss_cap is not None:
            loss_cap = arguments.number("loss_cap", loss_cap)
        backends.check_name(backend)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.fp16 = sample_rate, fp16
        self.loss_cap, self.backend = loss_cap, backend
        self.margin_softmax = margin_loss
        self.last_batch_size = 0
        self.weight_index: Tensor | None = None
        self._looked = False
        self._take_classes()
        if not isinstance(margin_loss, MarginLoss):
            warnings.warn(
                f"{type(margin_loss).__name__} is not fused: the (N, C) logits are held. "
                "marginkernels.compat.insightface has ArcFace, CosFace, CombinedMarginLoss, and "
                "MarginLoss for every other margin",
                stacklevel=2,
            )
        self.weight = nn.Parameter(in_huge_pages(torch.empty(self.num_local, embedding_size)))
        self._reset_weight()

    def _take_classes(self) -> None:
        """Takes this rank's classes, split as insightface does, and compares settings of ranks."""
        self.rank, self.world_size = self._ranks()
        each, more = divmod(self.num_classes, self.world_size)
        if each == 0:
            raise ValueError(
                f"num_classes: expected a class per rank at least, got {self.num_classes} for "
                f"{self.world_size} ranks"
            )
        self.num_local = each + (self.rank < more)
        self.class_start = each * self.rank + min(self.rank, more)
        self.num_sample = int(self.sample_rate * self.num_local)
        self.shard: ClassShard | None = None
        group = dist.group.WORLD if self.world_size > 1 else None
        if group is not None:
            stop = self.class_start + self.num_local
            self.shard = ClassShard(self.class_start, stop, self.num_classes, group)
            refuse_ddp()
            margin_loss: object = self.margin_softmax
            if not isinstance(margin_loss, MarginLoss):
                margin_loss = type(margin_loss).__name__
            require_agreement(
                group, embedding_size=self.embedding_size, num_classes=self.num_classes,
                sample_rate=self.sample_rate, fp16=self.fp16, margin_loss=margin_loss,
            )  # fmt: skip

    def _ranks(self) -> tuple[int, int]:
        """Returns this rank and the number of ranks that the classes are split over."""
        return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)

    def reset_parameters(self) -> None:
        """Starts afresh, as after ``to_empty``.

        The weight is drawn from N(0, 0.01^2). The margin loss and its modules are reset where they
        have ``reset_parameters``.
        """
        self._reset_weight()
        arguments.reset_inside(self)

    def _reset_weight(self) -> None:
        if not self.weight.is_meta:
            generator = rank_generator(self.weight.device, self.rank)
            nn.init.normal_(self.weight, std=0.01, generator=generator)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Computes the mean loss of all ranks' rows, the same on all; 0 where there are none.

        Args:
            local_embeddings: (N, D), this rank's.
            local_labels: (N,) or (N, 1), their classes of [0, num_classes): integers, of any type
                that holds every class exactly.
        """
        return self._mean_loss(local_embeddings, local_labels)

    def _mean_loss(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        self._warn_if_alone()
        try:
            label = self._checked(local_embeddings, local_labels)
        except Exception as error:
            if self.shard is not None:  # it raises the error on all ranks
                Sharded(self.shard, local_embeddings, self.weight, error=error)
            raise
        self.last_batch_size = len(local_embeddings)
        if isinstance(self.margin_softmax, MarginLoss):
            losses = self._fused(self.margin_softmax, local_embeddings, label)
        else:
            losses = self._dense(local_embeddings, label)
        cap = self.loss_cap
        if cap is not None:
            losses = margins.straight_through(lambda loss: loss.clamp_max(cap), losses)
        return losses.sum() / max(len(losses), 1)

    def _checked(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the labels as int64, after checks in the words of :meth:`forward`."""
        if self._update is not None and not isinstance(self.margin_softmax, MarginLoss):
            raise TypeError(
                "margin_loss: expected a MarginLoss for an optimizer of marginkernels.optim, got "
                f"{type(self.margin_softmax).__name__}, which is not fused"
            )
        validation.check_tensor("local_embeddings", x, like=self.weight)
        if x.ndim != 2 or x.shape[1] != self.embedding_size:
            raise ValueError(
                f"local_embeddings: expected shape (N, {self.embedding_size}), got {tuple(x.shape)}"
            )
        if not isinstance(labels, Tensor):
            raise TypeError(f"local_labels: expected a tensor, got {type(labels).__name__}")
        validation.check_local("local_labels", labels)
        label = self._of_rows(x, labels)
        if labels.device != x.device:
            raise ValueError(
                f"local_labels: expected device {x.device} as local_embeddings, got {labels.device}"
            )
        label = self._classes(label)
        if device_checks.checks_values(x.device):
            label = ops.checked_labels(label, self.num_classes, None, "local_labels")
            norm = row_norm(x.detach(), self._compute_dtype(x))
            label = ops.checked(label, norm, 0, numerics.GREATEST_NORM, _BAD_EMBEDDINGS)
        return label

    def _of_rows(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the labels of the rows that a step takes: here all of them, (N,)."""
        if labels.numel() != len(x):
            raise ValueError(
                f"local_labels: expected shape ({len(x)},), one label per row of local_embeddings, "
                f"got {tuple(labels.shape)}"
            )
        return labels.reshape(-1)

    def _classes(self, labels: Tensor) -> Tensor:
        """Returns the labels as int64, -1 where they are fractions."""
        if not labels.is_floating_point():
            return labels.long()
        exact = 2 / torch.finfo(labels.dtype).eps  # from here on two integers share one float
        if self.num_classes > exact:
            raise TypeError(
                f"local_labels: expected integers, got {labels.dtype}, which holds no more than "
                f"{exact:g} of num_classes={self.num_classes}"
            )
        whole = labels.long()
        return torch.where(whole == labels, whole, -1)  # -1 is wrong on every device

    def _warn_if_alone(self) -> None:
        """Says once that a head made before there was a group does not take part in it."""
        if self._looked or not in_group():
            return
        self._looked = True
        if self.world_size < dist.get_world_size():
            warnings.warn(
                f"{type(self).__name__}: made before init_process_group, it holds all "
                f"{self.num_classes} classes and learns from this rank's rows alone: the "
                f"{dist.get_world_size()} ranks' weights will differ. Make it after "
                "init_process_group",
                stacklevel=4,
            )

    def sample(self, local_class: Tensor) -> Tensor:
        """Chooses the classes of this rank for a step, and returns them sorted.

        Args:
            local_class: (N,), the rows' classes on this rank, or -1.
        """
        positive = torch.unique(local_class[local_class >= 0])
        if len(positive) > self.num_sample:
            self.weight_index = positive
        else:
            order = torch.rand(self.num_local).to(local_class.device)
            order[positive] = 2.0
            # a shard needs a class, where insightface fails
            self.weight_index = order.topk(max(self.num_sample, 1)).indices.sort().values
        return self.weight_index

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.float16 if self.fp16 else torch.promote_types(x.dtype, torch.float32)

    def _fused(self, margin_loss: MarginLoss, x: Tensor, y: Tensor) -> Tensor:
        """Computes the loss of all rows, (N,)."""
        chosen = sampling.ChosenBy(self.sample) if self.sample_rate < 1 else None
        return self._losses(margin_loss, x, self.weight, y, shard=self.shard, sampling=chosen)

    def _losses(
        self, margin_loss: MarginLoss, x: Tensor, w: Tensor, y: Tensor, **options: Any
    ) -> Tensor:
        """Computes the loss of all rows on the class weights ``w``."""
        return functional.margin_cross_entropy(
            x,
            w,
            y,
            margin=margin_loss.fused,
            scale=margin_loss.s,
            reduction="none",
            ignore_index=ops.NO_LABEL,
            other_labels="negatives",
            compute_dtype=self._compute_dtype(x),
            backend=self.backend,
            update=self._update,
            **options,
        )

    def _dense(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the same with all logits, for a margin that takes nothing else."""
        weight: Tensor = self.weight
        exchange, class_id = opened(self.shard, x, weight, lambda: y, lambda _: {})
        x = exchange.features(x)
        class_id = exchange.rows(class_id, fill=ops.NO_LABEL)
        position = local_class = held(class_id, exchange.first_class, len(weight), ops.NO_LABEL)
        lost = position.new_zeros((), dtype=torch.bool)
        if self.sample_rate < 1:
            sample = sampling.ChosenBy(self.sample).choose(exchange, local_class, len(weight))
            _, position = sampling.sampled(
                len(weight), None, local_class, sample.classes, False, weight.dtype
            )
            weight = weight.index_select(0, sample.classes)
            lost = (local_class >= 0) & (position < 0)
            if sample.valid is not None:
                lost = lost | ~sample.valid
        with torch.autocast(x.device.type, torch.float16, enabled=self.fp16):
            logits = F.linear(F.normalize(x.to(weight.dtype)), F.normalize(weight))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(-1, 1)
        logits = self.margin_softmax(logits, position[:, None].clone())  # it may overwrite both
        target = logits.gather(1, position.clamp_min(0)[:, None])[:, 0]
        target = torch.where(position >= 0, target, 0)
        none = target.new_empty(0)
        lse = logits.logsumexp(1).masked_fill(lost, torch.nan)
        merged = exchange.merge(position, SweepResult(lse, target, none, none, none))
        return merged.lse - merged.target_cosine


def require_fused(margin_loss: object) -> None:
    """Raises TypeError unless it is a :class:`MarginLoss`."""
    if not isinstance(margin_loss, MarginLoss):
        raise TypeError(
            "margin_loss: expected a MarginLoss of marginkernels.compat, such as its "
            f"CombinedMarginLoss, got {type(margin_loss).__name__}"
        )


def _check_margin_loss(margin_loss: object) -> None:
    """Raises TypeError unless it is a :class:`MarginLoss` or another callable that can be one."""
    if isinstance(margin_loss, type):
        raise TypeError(
            f"margin_loss: expected an instance such as {margin_loss.__name__}(...), got the class"
        )
    if any(kind.__module__.startswith(margins.__name__) for kind in type(margin_loss).__mro__):
        name = type(margin_loss).__name__
        raise TypeError(
            f"margin_loss: expected a margin with its scale, MarginLoss({name}(...), s=64.0), got "
            f"{name} alone"
        )
    if not callable(margin_loss):
        raise TypeError(f"margin_loss: expected a callable, got {type(margin_loss).__name__}")
