# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the multi-label head of LLaVA-OneVision-Encoder: its trainer runs with this import::

    from marginkernels.compat.onevision import CombinedMarginLoss, PartialFC_V2

It stands for ``training/fused_partial_fc_v2_multi_res.py``, which the project's ``train.py``
imports, and with ``labels_per_row=3`` for ``training/fused_partial_fc_v2.py``. Unchanged are which
classes a rank has, the ``state_dict``, which labels a step takes at a seed, and that gradients are
those of the sum over a row's labels while the loss is their mean. These differ, beside what
:mod:`.insightface` lists:

- One sweep over the classes serves all labels of a row, where the project makes logits per label.
- With a ``sample_rate`` below 1 the labels share one sample of a step, and it holds all classes
  that are labels of the batch. In the project each label has a sample of its own.
"""

import torch
from torch import Tensor

from .. import arguments
from . import insightface
from .insightface import CombinedMarginLoss, MarginLoss

__all__ = ["CombinedMarginLoss", "MarginLoss", "PartialFC_V2"]


class PartialFC_V2(insightface.PartialFC_V2):  # noqa: N801
    """Splits the classes over the ranks of the default group, for rows of several labels each.

    The loss of a row is the mean of one softmax cross-entropy per label. Each is over all classes
    of the step. The row's other labels compete in it, without a margin. Gradients are times the
    number of labels, as in the project, whose backward adds up what its loss averages.

    Args:
        margin_loss, embedding_size, num_classes, sample_rate: as of
            :class:`insightface.PartialFC_V2`. The margin loss is a :class:`MarginLoss`.
        fp16: has no effect, as in the project.
        is_normlize: whether embeddings and weights are normalised, which they have to be.
        sample_num_feat: has no effect, as in the project.
        bf16: whether the linear layer computes in bfloat16, else it does in float32.
        labels_per_row: how many labels of a row a step takes.
        backend: see :func:`marginkernels.margin_cross_entropy`.
    """

    def __init__(
        self,
        margin_loss: MarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        is_normlize: int = 1,
        sample_num_feat: int | None = None,
        *,
        bf16: bool = True,
        labels_per_row: int = 8,
        backend: str = "auto",
    ):
        insightface.require_fused(margin_loss)
        if not is_normlize:
            raise ValueError(f"is_normlize: expected 1, as the project has it, got {is_normlize}")
        self.labels_per_row = arguments.integer("labels_per_row", labels_per_row)
        self.bf16 = bool(bf16)
        super().__init__(margin_loss, embedding_size, num_classes, sample_rate, backend=backend)

    def forward(  # type: ignore[override]
        self, local_embeddings: Tensor, local_labels: Tensor, random_diff: int
    ) -> Tensor:
        """Computes the mean loss of all ranks' rows, the same on all; 0 where there are none.

        Each row draws ``labels_per_row`` of its first ``random_diff`` labels by ``torch.rand`` on
        the device, as in the project.

        Args:
            local_embeddings: (N, D), this rank's.
            local_labels: (N, L), integers, the classes of each row.
            random_diff: from how many labels to draw, at most L.
        """
        self._random_diff = random_diff
        loss = self._mean_loss(local_embeddings, local_labels)
        return loss.detach() + min(random_diff, self.labels_per_row) * (loss - loss.detach())

    def _of_rows(self, x: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim != 2 or len(labels) != len(x):
            raise ValueError(
                f"local_labels: expected shape ({len(x)}, L), the labels of each row of "
                f"local_embeddings, got {tuple(labels.shape)}"
            )
        count = arguments.integer("random_diff", self._random_diff, most=labels.shape[1])
        order = torch.rand(len(labels), count, device=labels.device).argsort(dim=1)
        return labels.gather(1, order[:, : self.labels_per_row])

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else super()._compute_dtype(x)
