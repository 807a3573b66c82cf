# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Replaces a backend by one that cannot run, and asks what a backend can do."""

import pytest
import torch

from marginkernels import backends


class StandIn(backends.Backend):
    """Takes the place of a backend that it has the name of, and cannot run for reasons made up."""

    def __init__(self, name: str, *why_not: str) -> None:
        replaced = backends.get(name)
        self.name, self.priority, self.caveat = replaced.name, replaced.priority, replaced.caveat
        self.why_not = why_not

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        return list(self.why_not)


def skip_without_tiles(backend: str) -> None:
    """Skips the test if the backend cannot save its exponentials."""
    if not backends.get(backend).keeps_tiles:
        pytest.skip(f"the {backend} backend keeps no tiles")
