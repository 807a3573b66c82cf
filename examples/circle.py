# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains the toy of the ArcFace paper: ten classes in two dimensions, where one can see them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import marginkernels as mk
import model
import training

GLYPHS = "一二三四五六七八九十"
BATCH_SIZE, STEPS, SHOWN = 100, 400, 800


class Toy(NamedTuple):
    """Holds the weights of a trained head, and embeddings of augmented images."""

    embeddings: Tensor  # (SHOWN, 2)
    labels: Tensor  # (SHOWN,)
    weight: Tensor  # (10, 2)

    def degrees(self) -> Tensor:
        """Returns the angle between each embedding and its class, (SHOWN,)."""
        cosine = F.cosine_similarity(self.embeddings, self.weight[self.labels])
        return cosine.clamp(-1, 1).acos().rad2deg()


HEADS: dict[str, dict[str, Any]] = {
    "Softmax, with bias": dict(margin=mk.NSoftmax(), scale=1.0, normalize="none", bias=True),
    "N-Softmax": dict(margin=mk.NSoftmax(), scale=16.0),
    "ArcFace, m = 0.3": dict(margin=mk.ArcFace(0.3), scale=16.0),
}


def backbone() -> nn.Module:
    """Builds a small CNN, (M, 1, 32, 32) -> (M, 2)."""
    network = nn.Sequential(
        nn.PixelUnshuffle(2),
        *model.conv(4, 16),
        nn.MaxPool2d(2),
        *model.conv(16, 32),
        nn.MaxPool2d(2),
        *model.conv(32, 32),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 2),
    )
    return model.channels_last(network)


def glyphs() -> Tensor:
    """Loads the ten characters in eight faces, (10, 8, 32, 32)."""
    characters, _, images = data.load()
    return images[[characters.index(glyph) for glyph in GLYPHS]]


def train() -> dict[str, Toy]:
    """Trains a network with each head, from the same initial weights and on the same batches."""
    faces = glyphs()
    images = faces.flatten(0, 1)[:, None]
    labels = torch.arange(len(GLYPHS)).repeat_interleave(faces.shape[1])
    # images are repeated, because an epoch has to fill some batches
    images, labels = images.repeat(10, 1, 1, 1), labels.repeat(10)
    toys = {}
    for name, settings in HEADS.items():
        torch.manual_seed(1)
        network = backbone()
        head = mk.MarginSoftmaxHead(2, len(GLYPHS), **settings)
        batches = data.batches(images, labels, BATCH_SIZE, STEPS, torch.Generator().manual_seed(0))
        for _ in training.train(network, head, batches, STEPS, backbone_rate=0.05):
            pass
        inputs, shown = next(
            data.batches(images, labels, SHOWN, 1, torch.Generator().manual_seed(1))
        )
        with torch.inference_mode():
            toys[name] = Toy(network.eval()(inputs), shown, head.weight.detach())
    return toys
