# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with the loss of voxceleb_trainer, or of ESPnet, in a loop with the calls of the former.

python examples/trainers/voxceleb_loss.py

The trainer is not on PyPI. Its own loss is here one in plain PyTorch with the same formulas.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import compare


class AAMSoftmax(nn.Module):
    """Computes what ``loss/aamsoftmax.py`` does."""

    def __init__(
        self,
        nOut: int,  # noqa: N803
        nClasses: int,  # noqa: N803
        margin: float,
        scale: float,
        **kwargs: Any,
    ):
        super().__init__()
        self.m, self.s = margin, scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss, and the accuracy in percent, (1,)."""
        c = F.linear(F.normalize(x), F.normalize(self.weight))
        sine = (1 - c * c).clamp(0, 1).sqrt()
        phi = c * math.cos(self.m) - sine * math.sin(self.m)
        phi = torch.where(c > -math.cos(self.m), phi, c - self.m * math.sin(self.m))
        logits = self.s * torch.where(F.one_hot(label, c.shape[1]).bool(), phi, c)
        right = logits.detach().argmax(1) == label
        return F.cross_entropy(logits, label), 100 * right.float().mean(0, keepdim=True)


def train(ours: bool, run: compare.Run) -> None:
    """Trains as the trainer's ``train_network`` does."""
    loader = DataLoader(run.examples(), batch_size=run.batch_size)
    settings = dict(nOut=compare.EMBEDDING_SIZE, nClasses=run.classes, margin=0.2, scale=30)
    network = run.backbone().train()
    kind: type[nn.Module] = AAMSoftmax
    if ours:
        from marginkernels.compat.speaker import voxceleb

        kind = voxceleb.AAMSoftmax
    loss_function = kind(**settings, nPerSpeaker=1)
    optimizer = torch.optim.Adam([*network.parameters(), *loss_function.parameters()], lr=1e-3)
    top1 = 0.0
    for data, label in loader:
        optimizer.zero_grad()
        out = network(data).reshape(1, -1, compare.EMBEDDING_SIZE).transpose(1, 0).squeeze(1)
        nloss, prec1 = loss_function.forward(out, label)
        nloss.backward()
        optimizer.step()
        top1 += prec1.detach().cpu().item()
        run.log(nloss)


if __name__ == "__main__":
    compare.main(train)
