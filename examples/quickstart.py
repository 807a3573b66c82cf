# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains a small network with the fused ArcFace head, and finds the class of new points.

python examples/quickstart.py    # seconds on a CPU
"""

import torch
from torch import nn

from marginkernels import ArcFace, MarginSoftmaxHead

IDENTITIES, FEATURES, EMBEDDING_SIZE = 1000, 64, 32
STEPS, BATCH_SIZE = 200, 256


def photographs(people: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Draws a noisy observation of each person in ``labels``, (N, FEATURES)."""
    return people[labels] + 0.8 * torch.randn(len(labels), FEATURES)


def main() -> None:
    torch.manual_seed(0)
    people = torch.randn(IDENTITIES, FEATURES)
    backbone = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE))
    head = MarginSoftmaxHead(EMBEDDING_SIZE, IDENTITIES, margin=ArcFace(0.3), scale=32.0)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=5e-3)
    for step in range(STEPS):
        labels = torch.randint(IDENTITIES, (BATCH_SIZE,))
        loss, stats = head(backbone(photographs(people, labels)), labels, return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            accuracy = stats.correct.float().mean()
            print(f"step {step:3}: loss {loss.item():6.3f}, accuracy of the batch {accuracy:.1%}")

    labels = torch.arange(IDENTITIES)
    with torch.inference_mode():
        _, classes = head.topk(backbone(photographs(people, labels)), k=5)
    found = (classes == labels[:, None]).float()
    first, five = found[:, 0].mean(), found.sum(1).mean()
    print(f"new photographs: first {first:.1%}, among the first five {five:.1%}")


if __name__ == "__main__":
    main()
