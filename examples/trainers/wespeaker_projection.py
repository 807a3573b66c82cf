# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with a projection of wespeaker in a loop with the calls of its executor.

python examples/trainers/wespeaker_projection.py

wespeaker is not on PyPI. Its own head is here one in plain PyTorch with the same formulas.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare

K, MP, K_TOP, SCALE = 3, 0.06, 5, 32.0


class InterTopK(nn.Module):
    """Computes the logits of wespeaker's ArcMarginProduct_intertopk_subcenter."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        weight = torch.empty(K * out_features, in_features)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))
        self.margin = 0.0

    def update(self, margin: float) -> None:
        """Sets the margin."""
        self.margin = margin

    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        """Returns the scaled logits (N, C) with margin and penalty."""
        c = F.linear(F.normalize(input), F.normalize(self.weight))
        c = c.unflatten(1, (-1, K)).amax(2)
        own = F.one_hot(label, c.shape[1]).bool()
        nearest = c.masked_fill(own, -2).topk(K_TOP).indices
        near = torch.zeros_like(own).scatter(1, nearest, True)
        m, penalty, sine = self.margin, MP * self.margin / 0.2, (1 - c**2).sqrt()
        target = c * math.cos(m) - sine * math.sin(m)
        target = torch.where(c > -math.cos(m), target, c - 1 + math.cos(m))
        nearer = c * math.cos(penalty) + sine * math.sin(penalty)
        return SCALE * torch.where(own, target, torch.where(near, nearer, c))


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the margin growing from step to step, and counts right rows."""
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    model = run.backbone().train()
    if ours:
        from marginkernels.compat.speaker.wespeaker import get_projection

        conf = dict(embed_dim=compare.EMBEDDING_SIZE, num_class=run.classes, scale=SCALE)
        kind = dict(project_type="arc_margin_intertopk_subcenter", easy_margin=False)
        projection = get_projection(conf | kind)
    else:
        projection = InterTopK(compare.EMBEDDING_SIZE, run.classes)
    criterion, right = nn.CrossEntropyLoss(), 0
    parameters = [*model.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for i, (features, targets) in enumerate(loader):
        ratio = min(2 * i / run.steps, 1.0)
        projection.update(margin=0.2 * (1 - 1000**-ratio))  # type: ignore[operator]
        outputs = projection(model(features), targets)
        if isinstance(outputs, tuple):
            outputs, loss = outputs
        else:
            loss = criterion(outputs, targets)
        right += (outputs.cpu().detach().numpy().argmax(1) == targets.cpu().numpy()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss)


if __name__ == "__main__":
    compare.main(train)
