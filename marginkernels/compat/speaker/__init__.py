# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds drop-ins for heads of speaker trainers, each module named after what it replaces."""

from .speakerlab import AddMarginLoss, ArcMarginLoss, CosineClassifier
from .speechbrain import AdditiveAngularMargin, AngularMargin, Classifier, LogSoftmaxWrapper

__all__ = [
    "AddMarginLoss",
    "AdditiveAngularMargin",
    "AngularMargin",
    "ArcMarginLoss",
    "Classifier",
    "CosineClassifier",
    "LogSoftmaxWrapper",
]
