# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures the speed of a training step on one image: no faces are needed, and no time for them."""

config = dict(
    margin_list=(1.0, 0.0, 0.4),
    network="r50",
    sample_rate=0.1,
    fp16=True,
    fused_optimizer=True,
    batch_size=128,
    lr=0.1,
    rec="synthetic",
    num_classes=1_000_000,
    num_image=100_000,
    num_epoch=1,
)
