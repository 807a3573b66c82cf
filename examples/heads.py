# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the head of this library, and the same in plain PyTorch to compare it with."""

from torch import Tensor

from marginkernels import MarginSoftmaxHead
from marginkernels.testing import plain_margin_cross_entropy


class PlainHead(MarginSoftmaxHead):
    """Computes the same loss in plain PyTorch, which holds the logits."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss."""
        return plain_margin_cross_entropy(
            embeddings, self.weight, labels, margin=self.margin, scale=self.scale
        )


HEADS = {"fused": MarginSoftmaxHead, "torch": PlainHead}
