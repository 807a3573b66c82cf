# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with the multi-label head of LLaVA-OneVision-Encoder, as its train.py calls it.

python examples/trainers/onevision.py

The project is no package: the head in place of its own has its formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare

LABELS, DRAWN = 10, 8  # per image, and of these in a step


class Dense(nn.Module):
    """Makes logits for each label, and averages their losses; gradients are of the sum."""

    def __init__(self, embedding_size: int, num_classes: int, m: float):
        super().__init__()
        self.weight, self.m = nn.Parameter(torch.empty(num_classes, embedding_size)), m

    def forward(self, embeddings: Tensor, labels: Tensor, random_diff: int) -> Tensor:
        """Returns the loss, with the gradient that the project gives it."""
        keep = torch.rand(len(labels), random_diff).argsort(dim=1)[:, :DRAWN]
        x, w, losses = F.normalize(embeddings), F.normalize(self.weight), []
        for y in labels.gather(1, keep).T:
            cosine = F.linear(x, w).clamp(-1, 1)
            margin = torch.zeros_like(cosine).scatter_(1, y[:, None], self.m)
            losses.append(F.cross_entropy(64 * (cosine - margin), y))
        total = torch.stack(losses).sum()
        return (total / DRAWN).detach() + total - total.detach()


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the project's formulas, or with the fused head."""
    pfc: nn.Module
    if ours:
        from marginkernels.compat.onevision import CombinedMarginLoss, PartialFC_V2

        margin_loss = CombinedMarginLoss(64, 1, 0, 0.3, 0)
        pfc = PartialFC_V2(margin_loss, compare.EMBEDDING_SIZE, run.classes, bf16=False)
    else:
        pfc = Dense(compare.EMBEDDING_SIZE, run.classes, 0.3)
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    torch.manual_seed(0)
    # the image's own class, and nine that stand for its nearest clusters
    clusters = torch.randint(run.classes, (run.classes, LABELS))
    clusters[:, 0] = torch.arange(run.classes)
    backbone = run.backbone().train()
    nn.init.normal_(pfc.weight, std=0.01)
    groups = [{"params": m.parameters()} for m in (backbone, pfc)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
    for images, labels in loader:
        loss = pfc(backbone(images), clusters[labels], LABELS)
        loss.backward()
        for module in (backbone, pfc):
            nn.utils.clip_grad_norm_(module.parameters(), max_norm=5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
