# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lists the formats by name. Another one is another line here."""

from typing import Any

from .base import Format
from .distributed import Distributed
from .insightface import Insightface
from .one_file import OneFile


def _with_optimizer(head: dict[str, Any], optimizer: dict[str, Any] | None) -> dict[str, Any]:
    return {"head": head} | ({} if optimizer is None else {"optimizer": optimizer})


def _lightning(head: dict[str, Any], _: dict[str, Any] | None) -> dict[str, Any]:
    return {"state_dict": head}


_KNOWN: tuple[Format, ...] = (
    Insightface(),
    OneFile("metric-learning", ("W",), transposed=True, has_centers=True),
    OneFile("transformers", ("objective.weight",), transposed=True),
    OneFile("wespeaker", ("projection.weight",), has_centers=True, has_bias=True),
    OneFile("adaface", ("head.kernel", "kernel"), transposed=True, tree=_lightning),
    OneFile(
        "marginkernels", ("weight",), has_centers=True, has_bias=True, tree=_with_optimizer,
        has_optimizer=True,
    ),
    Distributed(),
)  # fmt: skip

FORMATS: dict[str, Format] = {each.name: each for each in _KNOWN}
