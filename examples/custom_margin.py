# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines a margin of its own and checks it against the dense formula in plain PyTorch.

A margin maps the cosine c of each row and its class to the t that takes its place. No kernel knows
it, so that a new loss takes a few lines.

    python examples/custom_margin.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginkernels import MarginSoftmaxHead
from marginkernels.margins import Margin, Rows


class PowerMargin(Margin):
    """Subtracts a margin that grows as a row gets easier: t = c - m ((1 + c) / 2)^p.

    Args:
        m: margin at c = 1, a cosine.
        p: exponent, at least 1.
    """

    def __init__(self, m: float = 0.4, p: float = 2.0):
        super().__init__()
        self.m, self.p = m, p

    def forward(self, c: Tensor, rows: Rows) -> Tensor:  # (N,) -> (N,)
        """Returns t."""
        return c - self.m * ((1 + c) / 2) ** self.p


def dense_loss(x: Tensor, w: Tensor, y: Tensor, margin: nn.Module, scale: float) -> Tensor:
    """Computes the same loss with all (N, C) logits."""
    cosine = F.linear(F.normalize(x), F.normalize(w))
    target = margin(cosine.gather(1, y[:, None])[:, 0], None)
    return F.cross_entropy(scale * cosine.scatter(1, y[:, None], target[:, None]), y)


def main() -> None:
    torch.manual_seed(0)
    head = MarginSoftmaxHead(64, 10_000, margin=PowerMargin(), scale=32.0)
    x, y = torch.randn(128, 64, requires_grad=True), torch.randint(10_000, (128,))
    fused, dense = head(x, y), dense_loss(x, head.weight, y, head.margin, 32.0)
    print(f"loss: fused {fused.item():.6f}, dense {dense.item():.6f}")
    for name, leaf in (("dx", x), ("dw", head.weight)):
        a, b = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (fused, dense))
        print(f"{name}: relative difference {((a - b).norm() / b.norm()).item():.1e}")


if __name__ == "__main__":
    main()
