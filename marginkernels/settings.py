# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the settings of a loss, once for the function and the head."""

from typing import Any, NamedTuple

import torch


class Settings(NamedTuple):
    """Holds the settings of :func:`marginkernels.margin_cross_entropy` as they were given."""

    normalize: str
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    focal_gamma: float
    compute_dtype: torch.dtype | None
    save_tiles: str | bool
    backend: str
    sub_centers: int = 1
    other_labels: str = "exclude"


def shared(settings: Settings) -> dict[str, object]:
    """Returns the settings that have to be the same on all ranks, by name.

    Ranks may differ in how they compute.
    """
    return {
        name: value
        for name, value in settings._asdict().items()
        if name not in ("save_tiles", "backend")
    }


class Setting:
    """Reads a field of ``head.settings`` as an attribute of the head, and replaces it there."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, head: Any, owner: type | None = None) -> Any:
        return self if head is None else getattr(head.settings, self.name)

    def __set__(self, head: Any, value: object) -> None:
        head.settings = head.settings._replace(**{self.name: value})
