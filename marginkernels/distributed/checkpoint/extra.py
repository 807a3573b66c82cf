# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Saves and restores what a run has beside model and optimizer: schedulers, scalers, numbers."""

import io
from collections.abc import Mapping
from typing import Any

import torch

from .index import Index
from .optimizers import python_number


class Extra:
    """Collects the states of named objects, and plain values.

    Each is one entry of the checkpoint, written by ``torch.save``: an empty state leaves its trace
    too.

    Raises:
        TypeError: it is no mapping of strings.
        ValueError: a value is not of the kinds that ``torch.load(weights_only=True)`` reads.
    """

    def __init__(self, extra: Mapping[str, Any] | None):
        if not isinstance(extra, Mapping | None):
            raise TypeError(f"extra: expected a mapping by names, got {type(extra).__name__}")
        self._given = dict(extra or {})
        for name in self._given:
            if not isinstance(name, str):
                raise TypeError(f"extra: expected strings as names, got {name!r}")
        self._saved: dict[str, Any] = {}

    def to_save(self) -> dict[str, Any]:
        """Returns the part of the state that ``torch.distributed.checkpoint.save`` takes."""
        packed = {name: _packed(name, value) for name, value in self._given.items()}
        return {"extra": packed} if packed else {}

    def read(self, index: Index) -> None:
        """Reads all entries.

        Raises:
            ValueError: an object's state was not saved.
        """
        entries = {path[0]: key for key, path in index.under("extra").items()}
        for name, value in self._given.items():
            if hasattr(value, "load_state_dict") and name not in entries:
                raise ValueError(
                    f"extra: expected names that {index.folder} has, {sorted(entries)}, got "
                    f"{name!r}"
                )
        self._saved = {name: _unpacked(index.read(key)) for name, key in entries.items()}

    def apply(self) -> dict[str, Any]:
        """Gives the objects their states, and returns all that was read."""
        for name, value in self._given.items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(self._saved[name])
        return self._saved


def _packed(name: str, value: Any) -> bytes:
    """Returns the bytes of a value, or of an object's state."""
    state = value.state_dict() if hasattr(value, "state_dict") else python_number(value)
    file = io.BytesIO()
    try:
        torch.save(state, file)
        _unpacked(file.getvalue())
    except Exception as error:
        raise ValueError(
            f"extra: expected tensors, numbers, strings, lists and dictionaries in {name!r}, got "
            f"{type(value).__name__}: {error}"
        ) from error
    return file.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
