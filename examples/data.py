# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Loads, splits and augments the data: Han characters as identities, typefaces as photographs."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = Path(__file__).parent / "hanzi" / "hanzi.npz"

# Training sees print, verification handwriting. Whole designs are held out, with all their weights:
# the bold face of a design that training has seen would not be unseen.
TRAIN_DESIGNS = ("Noto Sans", "Noto Serif")
GALLERY_DESIGN = "WenKai"
PROBE_DESIGN = "Seto"
TEST_CHARACTERS = 2000


class Split(NamedTuple):
    """Holds images for training and for verification, which share no character and no design."""

    images: Tensor  # (M, 1, 32, 32) uint8, 1 is ink
    labels: Tensor  # (M,) int64 in [0, num_classes)
    num_classes: int
    gallery: Tensor  # (faces, characters, 32, 32) uint8, unseen characters in one unseen design
    probe: Tensor  # (faces, characters, 32, 32) uint8, the same characters in another unseen design


def load(path: Path = DATA) -> tuple[list[str], list[str], Tensor]:
    """Returns characters, names of faces and bits (characters, faces, 32, 32) in uint8."""
    with np.load(path) as file:
        bits = np.unpackbits(file["bitmaps"], axis=-1)
        characters, faces = file["characters"].tolist(), file["faces"].tolist()
    return characters, faces, torch.from_numpy(bits.reshape(len(characters), len(faces), 32, 32))


def split(faces: list[str], images: Tensor) -> Split:
    """Draws the unseen characters, always the same ones, and sorts the faces by design."""

    def of(characters: Tensor, *designs: str) -> Tensor:  # (characters, their faces, 32, 32)
        columns = [i for i, face in enumerate(faces) if face.startswith(designs)]
        return images[characters][:, columns]

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    unseen, seen = order[:TEST_CHARACTERS], order[TEST_CHARACTERS:]
    training = of(seen, *TRAIN_DESIGNS)
    labels = torch.arange(len(seen)).repeat_interleave(training.shape[1])
    return Split(
        training.reshape(-1, 1, 32, 32),
        labels,
        len(seen),
        of(unseen, GALLERY_DESIGN).transpose(0, 1),
        of(unseen, PROBE_DESIGN).transpose(0, 1),
    )


def with_wrong_labels(split: Split, share: float, seed: int) -> Tensor:
    """Returns labels of which exactly ``share`` name another class, each drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = split.labels.clone()
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    offset = torch.randint(1, split.num_classes, (len(wrong),), generator=generator)
    labels[wrong] = (labels[wrong] + offset) % split.num_classes
    return labels


def to_input(images: Tensor) -> Tensor:
    """Turns bits (M, 1, 32, 32) into floats in channels_last, ink 1 and paper -1."""
    return images.float().mul(2).sub(1).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Imitates another hand and camera: a random affine map and grain for each (1, 32, 32)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, shear = uniform(-0.2, 0.2), uniform(-0.3, 0.3)
    width, height = torch.exp(uniform(-0.25, 0.25)), torch.exp(uniform(-0.25, 0.25))
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        torch.stack([width * cos, shear - height * sin, uniform(-0.12, 0.12)], 1),
        torch.stack([width * sin, height * cos, uniform(-0.12, 0.12)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # paper is 0 in the bits, which is what grid_sample fills in from outside
    moved = F.grid_sample(images.float(), grid, align_corners=False)
    grain = torch.randn(moved.shape, generator=generator) * uniform(0, 0.8)[:, None, None, None]
    return to_input(moved) + grain


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
    together: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``steps`` augmented batches (inputs, labels), each epoch in a new order.

    ``together`` neighbours are always drawn together. With the number of images of a character, a
    batch holds whole characters.
    """
    batches_per_epoch = len(labels) // batch_size  # each epoch leaves out a few others
    for step in range(steps):
        at = step % batches_per_epoch
        if at == 0:
            groups = torch.randperm(len(labels) // together, generator=generator)
            order = (groups[:, None] * together + torch.arange(together)).flatten()
        rows = order[at * batch_size : (at + 1) * batch_size]
        yield augment(images[rows], generator), labels[rows]
