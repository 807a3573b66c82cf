# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Splits the classes over the ranks of a group.

:mod:`.shard` says which rank holds which classes, :mod:`.exchange` is what a step exchanges,
:mod:`.checkpoint` saves and loads, :mod:`.optim` holds what optimizers need where whole and sharded
parameters train together, and :mod:`.extend` adds classes.
"""

from .optim import GradScaler, clip_grad_norm_, clip_grad_value_, param_groups
from .shard import ClassShard

__all__ = ["ClassShard", "GradScaler", "clip_grad_norm_", "clip_grad_value_", "param_groups"]
