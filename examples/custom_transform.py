# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines a loss that changes the other classes' logits, and checks it against the dense formula.

The transform has its definition in PyTorch here, which the reference backend computes. A transform
of the library has twins for the kernels too; the page "Extending" shows where.

    python examples/custom_transform.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marginkernels import MarginSoftmaxHead
from marginkernels.margins import Margin, Rows
from marginkernels.transforms import TRANSFORMS, Definition, Transform


def hard_boost(c: Tensor, row_parameter: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Computes c + b (c - a_i) where c > a_i, to push harder on classes that come near the row."""
    boost, above = constants[0], c - row_parameter[:, None]
    hard = above > 0
    return torch.where(hard, c + boost * above, c), torch.where(hard, 1 + boost, torch.ones_like(c))


TRANSFORMS["hard_boost"] = Definition(
    "hard_boost", hard_boost, constants=1, per_row=True, steepest_slope=lambda b: 1 + b[0].abs()
)


class HardBoost(Margin):
    """Adds b (c_j - c_y) to the cosine of each class that is nearer than the row's own."""

    def __init__(self, boost: float = 0.5):
        super().__init__()
        self.boost = boost

    def forward(self, c: Tensor, rows: Rows) -> Tensor:  # (N,) -> (N,)
        """Returns c: the target keeps its cosine."""
        return c

    def negatives(self, c: Tensor, rows: Rows) -> Transform:
        """Names the transform, with the target's cosine as the parameter of each row."""
        return Transform("hard_boost", c, torch.full((1,), self.boost, device=c.device))


def dense_loss(x: Tensor, w: Tensor, y: Tensor, boost: float, scale: float) -> Tensor:
    """Computes the same loss with all (N, C) logits."""
    cosine = F.linear(F.normalize(x), F.normalize(w))
    above = cosine - cosine.gather(1, y[:, None]).detach()
    return F.cross_entropy(scale * torch.where(above > 0, cosine + boost * above, cosine), y)


def main() -> None:
    torch.manual_seed(0)
    margin = HardBoost()
    head = MarginSoftmaxHead(64, 1000, margin=margin, scale=32.0, backend="reference")
    x, y = torch.randn(128, 64, requires_grad=True), torch.randint(1000, (128,))
    fused, dense = head(x, y), dense_loss(x, head.weight, y, margin.boost, 32.0)
    print(f"loss: fused {fused.item():.6f}, dense {dense.item():.6f}")
    for name, leaf in (("dx", x), ("dw", head.weight)):
        a, b = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (fused, dense))
        print(f"{name}: relative difference {((a - b).norm() / b.norm()).item():.1e}")


if __name__ == "__main__":
    main()
