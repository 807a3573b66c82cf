# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""``MarginSoftmaxHead``: the ``nn.Module`` that holds weight, margin, scale and settings."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import functional, ops, validation
from .functional import HeadStats, margin_cross_entropy

# classes per block of logits outside the training path: 8 MB of fp32 logits for 256 rows
_CHUNK = 8192


class MarginSoftmaxHead(nn.Module):
    """Class weights and :func:`margin_cross_entropy` on them: the last layer and the loss of a
    metric-learning classifier.

    Example::

        head = MarginSoftmaxHead(512, 100_000, margin=ArcFace(0.5), scale=64.0)
        loss = head(backbone(images), labels)
        loss.backward()

    Args:
        embedding_size: D.
        num_classes: C.
        margin, scale, normalize, reduction, ignore_index, label_smoothing, compute_dtype,
        save_tiles, backend:
            see :func:`margin_cross_entropy`. ``margin`` and ``scale`` may be reassigned at any
            step; a ``scale`` that is an ``nn.Parameter`` or module is trained and saved with the
            head, a plain tensor is saved as a buffer.
        bias: whether to learn a bias per class, from 0.
        device, dtype: of ``weight`` (C, D), which starts as N(0, 0.01^2), as in insightface
            arcface_torch.
    """

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
        compute_dtype: torch.dtype | None = None,
        save_tiles: str | bool = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        if not isinstance(scale, nn.Module):
            validation.check_scale(scale)
        validation.check_margin(margin, None, num_classes)
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.margin = margin
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale
        self.normalize, self.reduction, self.ignore_index = normalize, reduction, ignore_index
        self.label_smoothing, self.compute_dtype = label_smoothing, compute_dtype
        self.save_tiles, self.backend = save_tiles, backend
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight from N(0, 0.01^2), bias 0."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        row_margin: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """The loss of embeddings (N, D) with labels (N,); see :func:`margin_cross_entropy`."""
        return margin_cross_entropy(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            bias=self.bias,
            normalize=self.normalize,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            row_margin=row_margin,
            compute_dtype=self.compute_dtype,
            save_tiles=self.save_tiles,
            backend=self.backend,
            return_stats=return_stats,
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """The logits (N, C) without margin, scale * cos + bias for ``normalize="both"``, for
        evaluation.
        """
        return torch.cat([block for _, block in self._logit_blocks(embeddings)], dim=1)

    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k greatest logits of each row and their classes, (N, k) each, greatest first, without
        (N, C) logits.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k: expected an integer in [1, {self.num_classes}], got {k}")
        values = indices = None
        for start, block in self._logit_blocks(embeddings):
            best, where = block.topk(min(k, block.shape[1]), dim=1)
            where = where + start
            if values is not None:
                best, where = torch.cat([values, best], dim=1), torch.cat([indices, where], dim=1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                where = where.gather(1, order)
            values, indices = best, where
        return values, indices

    def _logit_blocks(self, embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First class and logits of one block of classes after another, in the statistics dtype."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings: expected (N, {self.embedding_size}), got {tuple(embeddings.shape)}"
            )
        compute_dtype = functional.resolve_compute_dtype(
            embeddings, self.weight, self.compute_dtype
        )
        scale = self.scale() if isinstance(self.scale, nn.Module) else self.scale
        stats_dtype, eps = ops.statistics_dtype(compute_dtype), ops.norm_min(compute_dtype)

        def rows(t: Tensor, normalised: bool) -> Tensor:
            t = t.to(compute_dtype).to(stats_dtype)
            return (
                t / torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp_min(eps)
                if normalised
                else t
            )

        x = scale * rows(embeddings, self.normalize == "both")
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, self.num_classes, _CHUNK):
                block = x @ rows(self.weight[start : start + _CHUNK], self.normalize != "none").T
                yield (
                    start,
                    block
                    if self.bias is None
                    else block + self.bias[start : start + _CHUNK].to(stats_dtype),
                )

    def extra_repr(self) -> str:
        scale = "" if isinstance(self.scale, nn.Module) else f", scale={float(self.scale):g}"
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}{scale}, "
            f"normalize={self.normalize!r}, bias={self.bias is not None}, backend={self.backend!r}"
        )
