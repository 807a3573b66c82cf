# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds ``MarginSoftmaxHead``, the ``nn.Module`` with weight, margin, scale and settings."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.torch_version import TorchVersion

from . import arguments, backends, cleaning, evaluation, validation
from .distributed.extend import extend
from .distributed.shard import (
    ClassShard,
    Sharding,
    copy_first,
    look_for_replicas,
    refuse_ddp,
    require_agreement,
    sharding_of,
    watch_wrappers,
)
from .functional import margin_cross_entropy
from .generators import without_unused
from .loss import HeadStats
from .sampling import PartialFC, step_generators
from .scales import AdaptiveScale, observer_of
from .settings import Setting, Settings, shared
from .update import Update
from .weights import ClassWeights

# before, torch.compile cannot update a parameter in backward:
# https://github.com/pytorch/pytorch/pull/178622
COMPILES_STEPS = TorchVersion(torch.__version__) >= "2.13"


class MarginSoftmaxHead(ClassWeights):
    """Joins the last layer of a classifier for embeddings with its loss.

    It holds the class weights and computes :func:`margin_cross_entropy` on them.

    Example::

        head = MarginSoftmaxHead(512, 100_000, margin=ArcFace(0.5), scale=64.0)
        loss = head(backbone(images), labels)
        loss.backward()

    Args:
        embedding_size: D.
        num_classes: C.
        margin, scale, normalize, reduction, ignore_index, label_smoothing, z_loss, focal_gamma,
        other_labels, compute_dtype, save_tiles, backend, sub_centers:
            see :func:`margin_cross_entropy`. ``margin`` and ``scale`` may be reassigned at any
            step; a ``scale`` that is an ``nn.Parameter`` or module is trained and saved with the
            head, a plain tensor is saved as a buffer.
        bias: whether to learn a bias per class, from 0.
        class_weight: see :func:`margin_cross_entropy`; a buffer, which may be reassigned.
        device, dtype: of ``weight`` (C K, D), K the ``sub_centers``, which starts as N(0, 0.01^2),
            as in insightface arcface_torch.
        sharding: splits the classes over the ranks of a process group, or of a device mesh of one
            dimension (``mesh["classes"]`` of a larger one), or as a :class:`Sharding` says. Then
            ``weight`` and ``bias`` are DTensors, Shard(0).
            :mod:`marginkernels.distributed.exchange` says what a step exchanges. All ranks
            construct the head, and call it, together. It must not be inside a
            DistributedDataParallel, which would overwrite every rank's classes with rank 0's: wrap
            the backbone.
        sampling: :class:`PartialFC`, for steps on a sample of the classes in training mode, or
            None. The state of the random numbers is saved with the head.

    The state of a margin, a scale or a sample moves at each forward in training mode. Leave the
    head out of ``torch.utils.checkpoint``, whose second forward would be another step: a head with
    state refuses it. With gradient caching (GradCache) call the head once, on the embeddings of all
    chunks. A trainer that calls the head twice before its optimizer steps, as SAM does or where
    gradients are accumulated, moves the state twice.
    """

    _given_scale: Tensor | None = None
    _given_class_weight: Tensor | None = None
    _update: Update | None = None  # of an optimizer of marginkernels.optim
    _counted: cleaning.Counted | None = None  # by center_counts
    _looked_for_replicas = False
    _split = False  # whether the weight was ever a DTensor: fully_shard's is none in its forward

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        *,
        margin: nn.Module,
        scale: float | Tensor | nn.Module,
        bias: bool = False,
        normalize: str = "both",
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        focal_gamma: float = 0.0,
        other_labels: str = "exclude",
        class_weight: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        save_tiles: str | bool = "auto",
        backend: str = "auto",
        sub_centers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sharding: Sharding | dist.ProcessGroup | DeviceMesh | None = None,
        sampling: PartialFC | None = None,
    ):
        super().__init__()
        embedding_size = arguments.integer("embedding_size", embedding_size)
        num_classes = arguments.integer("num_classes", num_classes)
        if not isinstance(scale, nn.Module):
            validation.check_scale(scale)
        backends.check_name(backend)
        arguments.boolean("bias", bias)
        if sharding is not None:
            sharding = sharding_of(sharding)
        hooks = validation.check_margin(margin, num_classes)
        self.settings = Settings(
            normalize, reduction, ignore_index, label_smoothing, z_loss, focal_gamma, compute_dtype,
            save_tiles, backend, sub_centers, other_labels,
        )  # fmt: skip
        validation.check_settings(self.settings)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        validation.check_class_weight(class_weight, num_classes, label_smoothing)
        self.margin, self.scale, self.class_weight = margin, scale, class_weight
        observer = observer_of(scale)
        validation.check_cosines(hooks, observer, normalize, bias)
        validation.check_sum(hooks, self.settings)
        validation.check_sampling(sampling, label_smoothing, hooks, observer)
        validation.check_own_generator(sampling)
        self.shard = self._mesh = None
        if sharding is not None:
            self._mesh, self.shard = sharding.split(num_classes, device, sub_centers)
            self._require_agreement(
                self.shard, bias=bias, dtype=dtype or torch.get_default_dtype(), sampling=sampling,
                class_weight=None if class_weight is None else class_weight.dtype,
            )  # fmt: skip
            self._copy_first(self.shard)
            refuse_ddp()
        self.sampler = None
        if sampling is not None and not sampling.takes_all:
            self.sampler = step_generators(None if self.shard is None else self.shard.group)
        self.sampling = sampling
        self.weight = self._parameter((num_classes * sub_centers, embedding_size), device, dtype)
        self.bias = self._parameter((num_classes,), device, dtype) if bias else None
        self._reset_classes()
        watch_wrappers()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale":
            if isinstance(value, AdaptiveScale):
                value.check(self.num_classes)
            arguments.replace(self, name, value)
        elif name == "class_weight":
            arguments.replace(self, name, value)
        elif name == "sampling":
            validation.check_own_generator(value)
            if self.sampler is None and not (value is None or value.takes_all):
                raise ValueError(
                    "sampling: expected None for a head that was made for all classes, and has no "
                    f"generator for a sample, got {value}"
                )
        elif name == "weight" and arguments.is_dtensor(value):
            self._split = True
        super().__setattr__(name, value)

    def _require_agreement(self, shard: ClassShard, **given: object) -> None:
        scale: object = self.scale
        if isinstance(scale, Tensor):
            scale = f"{type(scale).__name__} {scale.dtype} {tuple(scale.shape)}"
        require_agreement(
            shard.group, scale=scale, grad_scale=shard.grad_scale, even_batches=shard.even_batches,
            max_local_batch=shard.max_local_batch, embedding_size=self.embedding_size,
            num_classes=self.num_classes, margin=self.margin, **given, **shared(self.settings),
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Starts afresh, as after ``to_empty``.

        The weight is drawn from N(0, 0.01^2) and the bias is 0. Scale and margin are as they were
        last given, and their state is as it was in the beginning. Modules of the user's own are
        reset where they have ``reset_parameters``. For a sharded head the call is collective.

        A scale or margin that was given as a tensor on the meta device becomes NaN until it is
        filled or loaded, with a warning.
        """
        self._reset_classes()
        arguments.restore("scale", self.scale, self._given_scale)
        arguments.restore("class_weight", self.class_weight, self._given_class_weight)
        arguments.reset_inside(self)
        if self.shard is not None:
            self._copy_first(self.shard)

    def _copy_first(self, shard: ClassShard) -> None:
        """Gives all ranks rank 0's margin and scale: random numbers may differ. Collective."""
        named = (*self.named_parameters(), *self.named_buffers())
        others = [t for name, t in named if name not in ("weight", "bias")]
        copy_first(shard.group, others)

    @overload
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        row_margin: Tensor | None = None,
        label_weights: Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        row_margin: Tensor | None = None,
        label_weights: Tensor | None = None,
        return_stats: Literal[True],
    ) -> tuple[Tensor, HeadStats]: ...

    @overload
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        row_margin: Tensor | None = None,
        label_weights: Tensor | None = None,
        return_stats: bool,
    ) -> Tensor | tuple[Tensor, HeadStats]: ...

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        row_margin: Tensor | None = None,
        label_weights: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """Computes the loss of embeddings (N, D) with labels (N,), or (N, L) of several each.

        See :func:`margin_cross_entropy`.
        """
        if self.training and not (torch.compiler.is_compiling() or self._looked_for_replicas):
            look_for_replicas(self)
        traced = self.shard is None or self.shard.even_batches
        traced = traced and (self._update is None or COMPILES_STEPS)
        loss = self._loss if traced else self._eager_loss
        return loss(
            embeddings, labels, sample_weight=sample_weight, row_margin=row_margin,
            label_weights=label_weights, return_stats=return_stats,
        )  # fmt: skip

    def _loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Any:
        sampling = None
        if self.training and self.sampling is not None and self.sampler is not None:
            rank = 0 if self.shard is None else dist.get_rank(self.shard.group)
            generator = self.sampler(embeddings.device, rank)
            sampling = dataclasses.replace(self.sampling, generator=generator)
        return margin_cross_entropy(
            embeddings, self.held_weight(), labels, margin=self.margin, scale=self.scale,
            bias=self.held_bias(), shard=self.shard, sampling=sampling,
            update=self._update, class_weight=self.class_weight, **given,
            **self.settings._asdict(),
        )  # fmt: skip

    # torch.compile waits for no numbers of rows, and before COMPILES_STEPS moves no weight
    _eager_loss = torch._disable_dynamo(_loss)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Computes the logits (N, C) without margin, for evaluation.

        They are scale * cos + bias where both sides are normalised. A sharded head has none.
        """
        return evaluation.logits(evaluation.classes_of(self), embeddings)

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the k greatest of :meth:`logits` in each row, and their classes, (N, k) each.

        The greatest comes first. The (N, C) logits are never held. For a sharded head the call is
        collective: each rank gives its rows and gets theirs, over all classes.
        """
        return evaluation.topk(evaluation.classes_of(self), embeddings, k)

    def extend(
        self,
        k: int,
        *,
        init: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Adds k classes, from num_classes on.

        For a sharded head the call is collective: classes move between ranks, so that the split is
        DTensor's again.

        ``weight`` and ``bias`` become new parameters without a gradient. Margin and scale stay.

        Args:
            k: a positive integer.
            init: (k, D), or (k K, D) with K sub-centres: the new rows of ``weight``, the same on
                all ranks, for instance mean embeddings of the new classes; None: N(0, 0.01^2). The
                new biases are 0. Of equal centres of a class only the first would be trained.
            optimizer: one that holds the head's parameters, any of ``torch.optim`` but LBFGS: it
                goes on with the new ones, and what it keeps for each class starts for new classes
                as it started for old ones. The head's own, of :mod:`marginkernels.optim`, does so
                whether it is given or not.

        Raises:
            ValueError, TypeError: on all ranks before anything is changed, on bad arguments, for a
                weight that is parametrised, pruned or split by something else, and for a margin
                with a table of the classes: first give the head one with rows for the new ones.
            RuntimeError: a step of the head's own optimizer is under way.
        """
        extend(self, k, init, optimizer)

    def center_counts(
        self,
        source: Tensor | Iterable[tuple[Tensor, Tensor]],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Counts how many rows are nearest to each centre of their class, (C, K) int64.

        It remembers the K cosines of each row, for :meth:`drop_sub_centers`. For a sharded head the
        call is collective: ranks give their own rows, in as many batches as they have, and get the
        counts of all.

        Args:
            source: embeddings (M, D), or an iterable of batches (embeddings, labels), as
                ``((backbone(images), labels) for images, labels in loader)``. It runs without
                gradient.
            labels: (M,), for embeddings; ``ignore_index`` leaves a row out.
        """
        return cleaning.center_counts(self, source, labels)

    def drop_sub_centers(
        self,
        keep: str = "dominant",
        angle: float = 1.309,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Tensor:
        """Keeps one centre of each class, and says which of the counted rows are close to it.

        So does Sub-center ArcFace (Deng et al., ECCV 2020): the centre with most rows is the
        dominant one, and the others are dropped. Rows more than 75 degrees from it count as
        wrongly labelled and are removed. A plain head is then trained on the rest, from scratch
        in the paper. This head is a plain one from now on, which trains on.

        Args:
            keep: "dominant", the centre with most rows in :meth:`center_counts`, which has to come
                before; of equals, and of a class without rows, the first.
            angle: in radians, in (0, pi].
            optimizer: as for :meth:`extend`: it goes on with the rows that stay.

        Returns:
            (M,) bool, for the rows of this rank in the order in which they were counted: True where
            the row is at most ``angle`` from the dominant centre of its class, False for a row that
            was left out.

        Raises:
            RuntimeError: nothing was counted, or the weight has changed since.
        """
        return cleaning.drop_sub_centers(self, keep, angle, optimizer)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Returns ``state_dict()`` with the classes of all ranks, as an unsharded head has it.

        Collective: every rank gets the whole state. It loads into any head, sharded or not.
        """
        return {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in self.state_dict().items()
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict = without_unused(state_dict, prefix + "sampler", self.sampler)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        is_number = not isinstance(self.scale, Tensor | nn.Module)
        scale = f", scale={self.scale:g}" if is_number else ""
        of_class = f", sub_centers={self.sub_centers}" if self.sub_centers > 1 else ""
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}{of_class}"
            f"{scale}, normalize={self.settings.normalize!r}, bias={self.bias is not None}, "
            f"backend={self.settings.backend!r}"
        )


for _name in Settings._fields:
    if not hasattr(MarginSoftmaxHead, _name):
        setattr(MarginSoftmaxHead, _name, Setting(_name))
