# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with AdaFace's head, in a loop with the calls of the project's train_val.py.

python examples/trainers/adaface.py

The project is no package: the head in place of its own has its formulas.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare

SETTINGS = dict(m=0.4, t_alpha=0.01, h=0.333, s=64.0)


class Dense(nn.Module):
    """Makes the logits by the formulas of the project."""

    def __init__(self, embedding_size: int, classnum: int):
        super().__init__()
        kernel = torch.empty(embedding_size, classnum).uniform_(-1, 1)
        self.kernel = nn.Parameter(kernel.renorm_(2, 1, 1e-5).mul_(1e5))
        self.mean, self.std = torch.tensor(20.0), torch.tensor(100.0)

    def forward(self, embeddings: Tensor, norms: Tensor, label: Tensor) -> Tensor:
        """Returns the logits (N, C)."""
        m, t_alpha, h, s = SETTINGS.values()
        cosine = embeddings @ (self.kernel / self.kernel.norm(dim=0))
        cosine = cosine.clamp(-1 + 1e-3, 1 - 1e-3)
        with torch.no_grad():
            safe = norms.clip(0.001, 100)
            self.mean.lerp_(safe.mean(), t_alpha)
            self.std.lerp_(safe.std(), t_alpha)
            quality = (h * (safe - self.mean) / (self.std + 1e-3)).clip(-1, 1)
        own = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
        angle = (cosine.acos() - own * m * quality).clip(1e-3, torch.pi - 1e-3)
        return s * (angle.cos() - own * (m + m * quality))


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the project's formulas, or with the fused head."""
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    torch.manual_seed(0)
    model = run.backbone().train()
    head: Any = Dense(compare.EMBEDDING_SIZE, run.classes)
    if ours:
        from marginkernels.compat.adaface import build_head

        kernel = head.state_dict()
        head = build_head("adaface", compare.EMBEDDING_SIZE, run.classes, **SETTINGS)
        head.load_state_dict(kernel, strict=False)
    cross_entropy_loss = nn.CrossEntropyLoss()
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=1e-4)
    for images, labels in loader:
        features = model(images)
        norms = torch.norm(features, 2, 1, True)
        cos_thetas = head(features / norms, norms, labels)
        loss = cross_entropy_loss(cos_thetas, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
