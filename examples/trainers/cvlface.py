# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with CVLface's Partial FC and its AdaFace, in a loop with the calls of its train.py.

python examples/trainers/cvlface.py

The project is no package: the head in place of its own has its formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare

S, M, H, T_ALPHA = 64, 0.4, 0.333, 0.01


class Dense(nn.Module):
    """Has the formulas of the project on all logits, whose gradient passes straight through."""

    batch_mean: Tensor
    batch_std: Tensor

    def __init__(self, embedding_size: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.register_buffer("batch_mean", torch.tensor([20.0]))
        self.register_buffer("batch_std", torch.tensor([100.0]))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss."""
        cosine = F.linear(F.normalize(embeddings), F.normalize(self.weight)).clamp(-1, 1)
        with torch.no_grad():
            norms = embeddings.norm(dim=1).clip(0.001, 100)
            self.batch_mean.lerp_(norms.mean(), T_ALPHA)
            self.batch_std.lerp_(norms.std(), T_ALPHA)
            quality = (H * (norms - self.batch_mean) / (self.batch_std + 1e-3)).clip(-1, 1)
            c = cosine.gather(1, labels[:, None])[:, 0]
            turned = torch.cos(c.acos() - M * quality) - (M + M * quality)
            change = torch.zeros_like(cosine).scatter_(1, labels[:, None], (turned - c)[:, None])
        return F.cross_entropy(S * (cosine + change), labels)


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the project's formulas, or with the fused classifier."""
    classifier: nn.Module
    if ours:
        from marginkernels.compat.cvlface import AdaFaceLoss, PartialFC_V2

        margin_loss = AdaFaceLoss(S, m=M, h=H, t_alpha=T_ALPHA)
        classifier = PartialFC_V2(0, 1, margin_loss, compare.EMBEDDING_SIZE, run.classes)
    else:
        classifier = Dense(compare.EMBEDDING_SIZE, run.classes)
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    torch.manual_seed(0)
    model = run.backbone().train()
    nn.init.normal_(classifier.weight, std=0.01)
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=5e-4)
    for images, labels in loader:
        loss = classifier(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, max_norm=5)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
