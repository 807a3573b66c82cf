# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Values of the special registers in every lane of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import unsupported
from ..ptx_types import UDT, Array, u32

if TYPE_CHECKING:
    from ..syntax.elements import Instr
    from .state import State

AXES = {"x": 0, "y": 1, "z": 2}
MULTIPROCESSORS = 108


def position(index: Any, sizes: tuple[int, ...], axis: str) -> Any:
    """Returns the coordinate along `axis` of linear indices into a block or grid."""
    x, y, _ = sizes
    return {"x": index % x, "y": index // x % y, "z": index // (x * y)}[axis]


def _same(value: int) -> Array:
    return np.array([value])


def _cta(state: State) -> Array:
    return state.cta0 + state.lane_cta


def _below(state: State) -> Array:
    return (u32(1) << state.laneid) - u32(1)


def _own(state: State) -> Array:
    return u32(1) << state.laneid


VALUES: dict[str, Callable[[State, str], Array]] = {
    "%tid": lambda s, axis: position(s.tid, s.launch.block, axis),
    "%ntid": lambda s, axis: _same(s.launch.block[AXES[axis]]),
    "%ctaid": lambda s, axis: position(_cta(s), s.launch.grid, axis),
    "%clusterid": lambda s, axis: position(_cta(s), s.launch.grid, axis),
    "%nctaid": lambda s, axis: _same(s.launch.grid[AXES[axis]]),
    "%nclusterid": lambda s, axis: _same(s.launch.grid[AXES[axis]]),
    "%laneid": lambda s, _: s.laneid,
    "%warpid": lambda s, _: s.tid // 32,
    "%nwarpid": lambda s, _: _same(s.cta_warps),
    "%smid": lambda s, _: _cta(s) % MULTIPROCESSORS,
    "%nsmid": lambda s, _: _same(MULTIPROCESSORS),
    "%lanemask_eq": lambda s, _: _own(s),
    "%lanemask_lt": lambda s, _: _below(s),
    "%lanemask_le": lambda s, _: _below(s) | _own(s),
    "%lanemask_gt": lambda s, _: ~(_below(s) | _own(s)),
    "%lanemask_ge": lambda s, _: ~_below(s),
    "%dynamic_smem_size": lambda s, _: _same(s.launch.dynamic_shared),
    "%total_smem_size": lambda s, _: _same(s.launch.shared_bytes),
    "%cluster_nctaid": lambda s, _: _same(1),
    "%cluster_nctarank": lambda s, _: _same(1),
}
# clocks are read by mov; every cluster is one CTA
ALWAYS_ZERO = (
    "%gridid",
    "%clock",
    "%clock64",
    "%clock_hi",
    "%globaltimer",
    "%globaltimer_lo",
    "%cluster_ctaid",
    "%cluster_ctarank",
    "%is_explicit_cluster",
)
VALUES.update(dict.fromkeys(ALWAYS_ZERO, lambda s, _: _same(0)))


def check_special(name: str, ins: Instr) -> None:
    """Raises an error for a special register that the simulator does not know."""
    if name.partition(".")[0] not in VALUES:
        raise unsupported(ins, f"special register {name}")


def special_value(state: State, name: str, bits: int) -> Array:
    """Returns a special register as the register array that the instructions read."""
    base, _, axis = name.partition(".")
    return VALUES[base](state, axis).astype(UDT[bits])
