# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses normalised linear layer, margin and softmax cross-entropy over huge class counts."""

from . import optim
from .backends import backend_notes, backend_report
from .device_checks import set_device_checks
from .distributed import (
    ClassShard,
    GradScaler,
    Sharding,
    clip_grad_norm_,
    clip_grad_value_,
    param_groups,
)
from .functional import margin_cross_entropy
from .lazy import LazyCosine
from .loss import HeadStats
from .margins import (
    AdaFace,
    AdaMSoftmax,
    AirFace,
    AMSoftmax,
    ArcFace,
    ArcNegFace,
    ASoftmax,
    Circle,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    InterClassFilter,
    InterTopK,
    LSoftmax,
    MagFace,
    Margin,
    MVSoftmax,
    NSoftmax,
    ParametricMargin,
    Rows,
    SphereFace,
    SphereFace2,
    UnifiedCE,
    X2Softmax,
    margins_from_counts,
)
from .modules import MarginSoftmaxHead
from .sampling import PartialFC
from .scales import AdaCos, AdaptiveScale
from .schedules import MarginSchedule
from .triplet import TripletLoss
from .version import __version__

__all__ = [
    "AMSoftmax",
    "ASoftmax",
    "AdaCos",
    "AdaFace",
    "AdaMSoftmax",
    "AdaptiveScale",
    "AirFace",
    "ArcFace",
    "ArcNegFace",
    "Circle",
    "ClassShard",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "GradScaler",
    "HeadStats",
    "InterClassFilter",
    "InterTopK",
    "LSoftmax",
    "LazyCosine",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "MarginSchedule",
    "MarginSoftmaxHead",
    "NSoftmax",
    "ParametricMargin",
    "PartialFC",
    "Rows",
    "Sharding",
    "SphereFace",
    "SphereFace2",
    "TripletLoss",
    "UnifiedCE",
    "X2Softmax",
    "__version__",
    "backend_notes",
    "backend_report",
    "clip_grad_norm_",
    "clip_grad_value_",
    "margin_cross_entropy",
    "margins_from_counts",
    "optim",
    "param_groups",
    "set_device_checks",
]
