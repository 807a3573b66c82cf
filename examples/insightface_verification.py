# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Verifies what insightface_train.py trains: by the demo's pairs, or insightface's ``lfw.bin``."""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import insightface_data
from evaluate import FOLDS, Pairs, TenFold, draw_pairs, ten_fold
from insightface_config import Config

BATCH = 256


class Target(NamedTuple):
    """Holds pairs of images, (faces, identities, ...) in uint8, that the 10-fold protocol judges.

    Embeddings of an image and of its mirror image are added where ``mirrored``.
    """

    gallery: Tensor
    probe: Tensor
    pairs: Pairs
    mirrored: bool


def load(config: Config, images: insightface_data.Images) -> dict[str, Target]:
    """Loads the ``val_targets`` by their names.

    Raises:
        FileNotFoundError: there is no such target.
    """
    targets = {}
    for name in config.val_targets:
        path = Path(config.rec, f"{name}.bin")
        if isinstance(images, insightface_data.Characters) and name == "hanzi":
            split = images.split
            gallery, probe = split.gallery[:, :, None], split.probe[:, :, None]
            targets[name] = Target(gallery, probe, draw_pairs(split), False)
        elif path.exists():
            targets[name] = read_bin(path, config.image_size)
        else:
            raise FileNotFoundError(f"val_targets: expected a file {path}, found none")
    return targets


class _Plain(pickle.Unpickler):
    """Loads numbers, bytes and lists; other objects could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes of an old protocol
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"expected bytes and bools alone, got {module}.{name}")


def read_bin(path: Path, size: int) -> Target:
    """Reads a file of insightface: a pickle of encoded images, two per pair, and of bools."""
    with path.open("rb") as file:
        encoded, same = _Plain(file, encoding="bytes").load()
    count = len(same) // FOLDS * FOLDS
    images = torch.stack(
        [insightface_data.pixels(io.BytesIO(image), size) for image in encoded[: 2 * count]]
    )
    of_fold = torch.arange(count).view(FOLDS, -1)
    face = torch.zeros_like(of_fold)
    label = torch.tensor([bool(s) for s in same[:count]]).view(FOLDS, -1)
    pairs = Pairs(face, face, of_fold, of_fold, label)
    return Target(images[None, 0::2], images[None, 1::2], pairs, mirrored=True)


def judge(backbone: nn.Module, target: Target) -> TenFold:
    """Judges a network by the 10-fold protocol."""
    training = backbone.training
    backbone.eval()
    both = [_embed(backbone, images, target.mirrored) for images in (target.gallery, target.probe)]
    backbone.train(training)
    return ten_fold(both[0], both[1], target.pairs)


@torch.inference_mode()
def _embed(backbone: nn.Module, images: Tensor, mirrored: bool) -> Tensor:
    device = next(backbone.parameters()).device
    parts = []
    for part in images.flatten(0, 1).split(BATCH):
        to_input = data.to_input if part.shape[1] == 1 else insightface_data.to_input
        x = to_input(part.to(device))
        embeddings = backbone(x).float()
        if mirrored:
            embeddings = embeddings + backbone(x.flip(-1)).float()
        parts.append(F.normalize(embeddings).cpu())
    return torch.cat(parts).unflatten(0, images.shape[:2])
