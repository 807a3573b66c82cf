# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Splits the classes over the ranks of a group.

:mod:`.shard` says which rank holds which classes. :mod:`.exchange` exchanges what a step needs, by
the moves of :mod:`.collectives`. :mod:`.checkpoint` saves and loads, :mod:`.extend` adds classes.
:mod:`.optim` helps optimizers where whole and sharded parameters train together,
:mod:`.one_gather` several heads of the same embeddings.
"""

from .one_gather import one_gather
from .optim import GradScaler, clip_grad_norm_, clip_grad_value_, param_groups
from .shard import ClassShard, Sharding

__all__ = [
    "ClassShard",
    "GradScaler",
    "Sharding",
    "clip_grad_norm_",
    "clip_grad_value_",
    "one_gather",
    "param_groups",
]
