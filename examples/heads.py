# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the head of this library, and its twin in plain PyTorch to compare it with."""

from torch import Tensor, nn

from marginkernels import MarginSoftmaxHead
from marginkernels.testing import plain_margin_cross_entropy


class PlainHead(MarginSoftmaxHead):
    """Computes the same loss in plain PyTorch, which holds the logits."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the loss; unlike the fused head it takes no options."""
        assert not isinstance(self.scale, nn.Module), "the plain loss has no scale that adapts"
        return plain_margin_cross_entropy(
            embeddings, self.weight, labels, margin=self.margin, scale=self.scale
        )


HEADS = {"fused": MarginSoftmaxHead, "torch": PlainHead}
