# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Copies the state of a run, so that a thread may write it while the run goes on."""

import copy
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from .state import Rows


def staged(value: Any) -> Any:
    """Returns a copy in the memory of the CPU, with containers, tensors and :class:`Rows`."""
    if isinstance(value, dict):
        return {key: staged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        copies = [staged(inner) for inner in value]
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    if isinstance(value, Rows):
        return value.on_cpu()
    if isinstance(value, Tensor):  # torch knows how to copy the parts of a DTensor
        return BlockingAsyncStager().stage({"": value})[""]
    return copy.deepcopy(value)
