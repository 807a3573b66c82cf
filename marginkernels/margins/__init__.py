# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the margins by theme; :mod:`marginkernels.margins.base` says what a margin is."""

from .angles import safe_acos, safe_sin
from .annealed import ASoftmax, LSoftmax
from .base import Margin, MarginHooks, Rows, adapted, name_of, straight_through
from .binary import OneVersusRest, SphereFace2, UnifiedCE
from .negatives import AirFace, ArcNegFace, Circle, CurricularFace, MVSoftmax
from .norms import AdaFace, MagFace
from .parametric import Interval, ParametricMargin, SharedMargin
from .per_class import AdaMSoftmax, margins_from_counts
from .random import ElasticFace
from .target import AMSoftmax, ArcFace, CombinedMargin, CosFace, NSoftmax, SphereFace, X2Softmax
from .wrappers import InterClassFilter, InterTopK, Wrapper

__all__ = [
    "AMSoftmax",
    "ASoftmax",
    "AdaFace",
    "AdaMSoftmax",
    "AirFace",
    "ArcFace",
    "ArcNegFace",
    "Circle",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "InterClassFilter",
    "InterTopK",
    "Interval",
    "LSoftmax",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "MarginHooks",
    "NSoftmax",
    "OneVersusRest",
    "ParametricMargin",
    "Rows",
    "SharedMargin",
    "SphereFace",
    "SphereFace2",
    "UnifiedCE",
    "Wrapper",
    "X2Softmax",
    "adapted",
    "margins_from_counts",
    "name_of",
    "safe_acos",
    "safe_sin",
    "straight_through",
]
