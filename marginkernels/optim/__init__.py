# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds optimizers that move the class weights of a head inside its backward sweep.

    from marginkernels.optim import SGD

    head_optimizer = SGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    loss = head(backbone(images), labels)
    loss.backward()  # head.weight and its momentum move here; head.weight.grad stays None
    optimizer.step(); head_optimizer.step()

The gradient of the weights is projected and applied class by class while it is in the cache, and
never stored. In a step on a sample of the classes, all others stay as they are: their weights are
not decayed, and their state does not move. All ranks of a sharded head make its optimizer together.
"""

from .base import HeadOptimizer
from .optimizers import SGD, AdamW, RowwiseAdagrad

__all__ = ["SGD", "AdamW", "HeadOptimizer", "RowwiseAdagrad"]
