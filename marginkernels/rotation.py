# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the margins that kernels know: a rotation of the target's angle, in pieces.

A margin runs in PyTorch, on N numbers. One that is a rotation by numbers may say so, by
``margin.rotation()``: then a backend with ``head_loss`` computes the loss and its gradients in one
kernel. :func:`rotated` is the definition; its twins are csrc/loss.h and
backends/triton/loss_kernels.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import LEAST_SINE


class Rotation(NamedTuple):
    """Holds the numbers of t(c) = piece(c) - less.

    piece(c) is phi = cos c - sin sqrt(1 - c^2) where c > threshold, which is cos(theta + m), and
    elsewhere shift + past_cosine c + past_phi phi.
    """

    cos: float = 1.0
    sin: float = 0.0
    threshold: float = -math.inf
    shift: float = 0.0
    past_cosine: float = 1.0
    past_phi: float = 0.0
    less: float = 0.0
    exact: float = 1.0  # 0: dt/dc counts as 1


def rotated(c: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Returns t and dt/dc of the cosines c, (N,) each."""
    r = rotation
    sine = ((1 - c) * (1 + c)).clamp_min(0).sqrt()
    phi, slope = r.cos * c - r.sin * sine, r.cos + r.sin * c / sine.clamp_min(LEAST_SINE)
    inside = c > r.threshold
    t = torch.where(inside, phi, r.shift + r.past_cosine * c + r.past_phi * phi) - r.less
    slope = torch.where(inside, slope, r.past_cosine + r.past_phi * slope)
    return t, slope if r.exact else torch.ones_like(c)
