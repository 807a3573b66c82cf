# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Normalised linear layer, margin and softmax cross-entropy over huge class counts, fused."""

from .backends import backend_report
from .functional import HeadStats, margin_cross_entropy
from .margins import AMSoftmax, ArcFace, CombinedMargin, CosFace, Margin, NSoftmax, Rows, SphereFace
from .modules import MarginSoftmaxHead
from .validation import set_device_checks
from .version import __version__

__all__ = [
    "AMSoftmax",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "HeadStats",
    "Margin",
    "MarginSoftmaxHead",
    "NSoftmax",
    "Rows",
    "SphereFace",
    "__version__",
    "backend_report",
    "margin_cross_entropy",
    "set_device_checks",
]
