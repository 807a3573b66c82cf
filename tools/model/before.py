# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps what the steps launched at the commit that was measured, and what the model said of it.

The launchers have changed since. before.json lets the model be compared with the measurement, and
the present step with the one before; it is data, and nothing writes it any more.
"""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .code import Code, Tile
from .recording import Launch, Step

FILE = Path(__file__).with_name("before.json")


@functools.cache
def data() -> dict[str, Any]:
    """Returns the file."""
    return json.loads(FILE.read_text())


def codes() -> dict[str, Code]:
    """Returns the instruction counts of the kernels then, of sm_90."""
    return {name: Code(**counts) for name, counts in data()["code"].items()}


def step(backend: str, shape: tuple[int, ...], weights: str) -> Step:
    """Returns the launches of forward and backward on an H200."""
    found: Counter[Launch] = Counter()
    for calls, fields in data()["steps"][f"{backend} {'x'.join(map(str, shape))} {weights}"]:
        if "tile" in fields:
            fields = fields | {"tile": Tile(*fields["tile"])}
        found[Launch(**fields)] += calls
    return Step(found, Counter())


def total(gpu: str, backend: str, shape: tuple[int, ...], weights: str, optimizer: str) -> list:
    """Returns the modelled GPU ms, host ms, launches and bytes of a step."""
    place = f"{gpu} {backend} {'x'.join(map(str, shape))} {weights} {optimizer}".strip()
    return data()["totals"][place]
