# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Loads what insightface_train.py trains on; a dataset takes the row numbers of a whole batch."""

import importlib.util
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import data
from insightface_config import Config

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Images(Protocol):
    """Holds labelled images, which a :class:`torch.utils.data.DataLoader` fetches by batches."""

    shape: tuple[int, int]  # channels and size
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Returns images (N, channels, size, size), about in [-1, 1], and labels (N,)."""


class Synthetic:
    """Is one image of noise over and over, whose class goes round: for the speed of a step."""

    def __init__(self, count: int, num_classes: int, size: int):
        self.count, self.num_classes, self.shape = count, num_classes, (3, size)
        self.image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.image.repeat(len(rows), 1, 1, 1), torch.tensor(rows) % self.num_classes


class Characters:
    """Is the data of the demo, whose augmentation draws from torch's default generator."""

    shape = (1, 32)

    def __init__(self) -> None:
        _, faces, images = data.load()
        self.split = data.split(faces, images)
        self.num_classes = self.split.num_classes

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images = data.augment(self.split.images[rows], torch.default_generator)
        return images, self.split.labels[rows]


class Folder:
    """Reads a folder that has a folder of images per class, in the order of their names.

    Half of the images of a batch are mirrored, at random.
    """

    def __init__(self, root: Path, size: int):
        self.shape = (3, size)
        classes = sorted(path for path in root.iterdir() if path.is_dir())
        found = [
            (file, label)
            for label, folder in enumerate(classes)
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not found:
            hint = ""
            if (root / "train.rec").exists():
                hint = ": mxnet's train.rec is not read, unpack it into such folders"
            raise FileNotFoundError(
                f"rec: expected a folder of images per class in {root}, found none{hint}"
            )
        self.num_classes = len(classes)
        self.files = [file for file, _ in found]
        self.labels = torch.tensor([label for _, label in found])
        pixels(self.files[0], size)  # an error comes before training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images = to_input(torch.stack([pixels(self.files[row], self.shape[1]) for row in rows]))
        mirrored = torch.rand(len(rows)) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[rows]


def pixels(file: Path | BinaryIO, size: int) -> Tensor:
    """Returns an image as uint8, (3, size, size).

    Raises:
        ModuleNotFoundError: Pillow is missing.
        ValueError: it has another size.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError("rec: images of a folder need Pillow: pip install pillow")
    from PIL import Image

    with Image.open(file) as image:
        if image.size != (size, size):
            raise ValueError(
                f"image_size: expected images of {size} x {size} pixels, got {image.size} in {file}"
            )
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_input(images: Tensor) -> Tensor:
    """Turns uint8 into floats of [-1, 1]."""
    return images.float().div(127.5).sub(1)


def open_images(config: Config) -> Images:
    """Opens what ``rec`` names.

    Raises:
        FileNotFoundError: it is no folder of images.
        ValueError: it has more classes than ``num_classes``, or other than ``num_image`` images.
    """
    images: Images
    if config.rec == "synthetic":
        images = Synthetic(config.num_image, config.num_classes, config.image_size)
    elif config.rec == "hanzi":
        images = Characters()
    elif Path(config.rec).is_dir():
        images = Folder(Path(config.rec), config.image_size)
    else:
        raise FileNotFoundError(
            f'rec: expected "synthetic", "hanzi", or a folder of images per class, got {config.rec}'
        )
    if images.num_classes > config.num_classes:
        raise ValueError(
            f"num_classes: expected the {images.num_classes} of {config.rec} or more, "
            f"got {config.num_classes}"
        )
    if len(images) != config.num_image:
        raise ValueError(
            f"num_image: expected the {len(images)} of {config.rec}, got {config.num_image}"
        )
    return images


def loader(images: Images, config: Config, sampler: DistributedSampler, pin: bool) -> DataLoader:
    """Makes a loader of this rank's batches, all of them full.

    ``sampler`` draws the order of an epoch from the seed and the number of the epoch alone.
    """
    batches: Any = BatchSampler(sampler, config.batch_size, drop_last=True)
    dataset: Any = images  # it takes a batch of rows, as the sampler has them
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=config.num_workers,
        pin_memory=pin,
    )
