# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Verifies and identifies unseen characters, as face recognition measures it.

Every comparison is between two designs: one image has the gallery design, the other the probe
design.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split, to_input
from model import run

FOLDS = 10
PAIRS_PER_FOLD = 300  # of either kind: 6,000 pairs in all, as in LFW (Huang et al., 2007)
FAR = 1e-3
FAR_GRID = torch.logspace(-5, 0, 101, dtype=torch.float64)


class Pairs(NamedTuple):
    """Holds the 6,000 pairs of the 10-fold protocol; the folds share no character."""

    gallery_face: Tensor  # (10, 600) int64
    probe_face: Tensor  # (10, 600)
    gallery_character: Tensor  # (10, 600)
    probe_character: Tensor  # (10, 600)
    same: Tensor  # (10, 600) bool: the first 300 of each fold


class TenFold(NamedTuple):
    """Holds what the 10-fold protocol finds."""

    accuracy: float  # mean over the folds, each judged by the threshold best on the other nine
    deviation: float  # standard deviation over the folds
    threshold: float  # mean of the ten
    cosine: Tensor  # (10, 600) of each pair


class AllPairs(NamedTuple):
    """Holds what all pairs of gallery and probe show: thousands genuine, millions impostor."""

    auc: float
    roc: Tensor  # (101,) true accept rates at FAR_GRID
    tar: float  # the true accept rate at a false accept rate of 1e-3
    rank1: float  # fraction of probes whose nearest gallery image is of their own character


def draw_pairs(split: Split) -> Pairs:
    """Draws the pairs, the same in every run; no pair occurs twice."""
    generator = torch.Generator().manual_seed(0)
    gallery_faces, characters = split.gallery.shape[:2]
    probe_faces = split.probe.shape[0]
    folds = torch.randperm(characters, generator=generator).view(FOLDS, -1)
    size = folds.shape[1]
    # A pair within a fold is one number. Its digits are gallery face, probe face, character, and
    # the offset from it to the other character, which is 0 for a genuine pair.
    genuine = torch.arange(gallery_faces * probe_faces * size) * size
    impostor = torch.arange(gallery_faces * probe_faces * size * size)
    impostor = impostor[impostor % size != 0]

    def draw(numbers: Tensor) -> Tensor:
        return numbers[torch.randperm(len(numbers), generator=generator)[:PAIRS_PER_FOLD]]

    pair = torch.stack([torch.cat([draw(genuine), draw(impostor)]) for _ in range(FOLDS)])
    offset, character = pair % size, pair // size % size
    face = pair // size // size
    return Pairs(
        face // probe_faces,
        face % probe_faces,
        folds.gather(1, character),
        folds.gather(1, (character + offset) % size),
        offset == 0,
    )


@torch.inference_mode()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Returns unit embeddings (faces, characters, D) of images (faces, characters, 32, 32)."""
    training = model.training
    model.eval()
    parts = [run(model, to_input(part[:, None])) for part in images.flatten(0, 1).split(1000)]
    model.train(training)
    return F.normalize(torch.cat(parts)).unflatten(0, images.shape[:2])


def ten_fold(gallery: Tensor, probe: Tensor, pairs: Pairs) -> TenFold:
    """Judges the 6,000 pairs; embeddings are (faces, characters, D)."""
    left = gallery[pairs.gallery_face, pairs.gallery_character]
    right = probe[pairs.probe_face, pairs.probe_character]
    cosine = (left * right).sum(-1)
    thresholds = torch.linspace(-1, 1, 1001)
    right_answers = (cosine[..., None] > thresholds) == pairs.same[..., None]
    accuracy = right_answers.float().mean(1)  # (folds, thresholds)
    best = ((accuracy.sum(0) - accuracy) / (FOLDS - 1)).argmax(1)
    of_fold = accuracy.gather(1, best[:, None])
    mean_threshold = thresholds[best].mean().item()
    return TenFold(of_fold.mean().item(), of_fold.std().item(), mean_threshold, cosine)


def all_pairs(gallery: Tensor, probe: Tensor) -> AllPairs:
    """Compares each gallery image with each probe image; embeddings are (faces, characters, D)."""
    scores = torch.einsum("gid,pjd->gpij", gallery, probe)
    own = torch.eye(scores.shape[-1], dtype=torch.bool).expand_as(scores)
    genuine, impostor = scores[own], scores[~own].sort().values
    threshold = impostor[((1 - FAR_GRID) * (len(impostor) - 1)).long()]
    roc = (genuine[:, None] > threshold).double().mean(0)
    nearest = scores.amax(0).argmax(-2)  # (probe faces, characters)
    return AllPairs(
        (torch.searchsorted(impostor, genuine) / len(impostor)).mean().item(),
        roc,
        roc[(FAR_GRID - FAR).abs().argmin()].item(),
        (nearest == torch.arange(nearest.shape[-1])).double().mean().item(),
    )


def embed_both(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Embeds the gallery and the probe images."""
    return embed(model, split.gallery), embed(model, split.probe)


def judge(model: nn.Module, split: Split, pairs: Pairs) -> tuple[TenFold, AllPairs]:
    """Judges a network by both protocols."""
    gallery, probe = embed_both(model, split)
    return ten_fold(gallery, probe, pairs), all_pairs(gallery, probe)
