# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The margins by theme; see :mod:`marginkernels.margins.base` for what a margin is."""

from .annealed import ASoftmax, LSoftmax
from .base import Interval, Margin, NSoftmax, Rows, safe_acos, safe_sin
from .negatives import AirFace, ArcNegFace, CurricularFace, InterClassFilter, MVSoftmax
from .norms import AdaFace, MagFace
from .per_class import AdaMSoftmax, margins_from_counts
from .random import ElasticFace
from .target import AMSoftmax, ArcFace, CombinedMargin, CosFace, SphereFace, X2Softmax

__all__ = [
    "AMSoftmax",
    "ASoftmax",
    "AdaFace",
    "AdaMSoftmax",
    "AirFace",
    "ArcFace",
    "ArcNegFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InterClassFilter",
    "Interval",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "NSoftmax",
    "Rows",
    "SphereFace",
    "X2Softmax",
    "margins_from_counts",
    "safe_acos",
    "safe_sin",
]
