# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Models the time of a training step on GPUs that are not here; see docs/gpu_model.md."""

from .step import Prediction, Row, predict, predict_step

__all__ = ["Prediction", "Row", "predict", "predict_step"]
