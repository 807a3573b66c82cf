# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Launches a kernel: checks what the driver would check, runs the CTAs batch by batch, counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..memory import Device
from ..ptx_types import Array, align_up
from ..stats import Stats
from ..syntax.elements import Variable
from .batch import Batch
from .checks import Checks
from .program import Program

MAX_LANES = 8192  # threads that run together
BATCH_BYTES = 192 << 20  # of shared memory and what the checks keep for it
STATIC_SHARED_LIMIT = 48 * 1024
SHARED_LIMIT_KB = {
    **dict.fromkeys(("sm_70", "sm_72"), 96),
    "sm_75": 64,
    **dict.fromkeys(("sm_80", "sm_87"), 163),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99),
    **dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227),
}


@dataclass
class Launch:
    """Holds the parameters and counters that the batches of one launch share."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    checks: Checks
    want_stats: bool
    dynamic_shared: int
    shared_bytes: int
    max_steps: int
    counts: list[int]  # instruction -> warps that executed it
    stats: Stats
    steps: int = 0
    params: Array = field(default_factory=lambda: np.zeros(1, np.uint8))

    @property
    def threads(self) -> int:
        """Returns the number of threads in a CTA."""
        return self.block[0] * self.block[1] * self.block[2]

    def set_params(self, params: Array) -> None:
        """Stores the parameters, once more with padding so that wide loads stay inside."""
        self.params = params
        self.params_padded = np.zeros(align_up(len(params), 16) + 16, np.uint8)
        self.params_padded[: len(params)] = params


def pack_args(program: Program, args: Sequence[Any], device: Device) -> tuple[Array, list[int]]:
    """Returns the bytes of the parameters, and the allocations made for arrays among them."""
    if len(args) != len(program.params):
        raise ValueError(
            f"{program.entry.name} takes {len(program.params)} arguments, got {len(args)}"
        )
    out = np.zeros(max(program.param_bytes, 1), np.uint8)
    made = []
    for (param, offset), value in zip(program.params, args, strict=True):
        if param.size == 8 and param.scalar and _is_array(value):
            value = device.alloc(value, param.name)
            made.append(value)
        raw = arg_bytes(param, value)
        if len(raw) != param.size:
            raise ValueError(
                f"argument for {param.name}: {len(raw)} bytes given, {param.size} expected"
            )
        out[offset : offset + param.size] = np.frombuffer(raw, np.uint8)
    return out, made


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or type(value).__module__.startswith("torch")


def arg_bytes(param: Variable, value: Any) -> bytes:
    """Returns the bytes of a kernel argument."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, (np.ndarray, np.void)):
        return value.tobytes()
    if not param.scalar:
        raise TypeError(
            f"{param.name} is a {param.size}-byte struct: pass bytes or a numpy structured value"
        )
    if isinstance(value, np.generic):
        if value.dtype.itemsize == param.size:
            return value.tobytes()
        value = value.item()
    value = 0 if value is None else value
    if isinstance(value, float) or param.type[0] == "f":
        return np.dtype(f"f{param.size}").type(value).tobytes()
    return (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")


def check_limits(setup: Launch, program: Program) -> None:
    """Raises an error for what the driver would refuse to launch."""
    entry = program.entry
    if entry.reqntid and tuple(entry.reqntid) != setup.block:
        raise ValueError(
            f"{entry.name} requires block {entry.reqntid}, launched with {setup.block}"
        )
    if entry.maxntid:
        allowed = entry.maxntid[0] * entry.maxntid[1] * entry.maxntid[2]
        if setup.threads > allowed:
            raise ValueError(
                f"{entry.name} allows {entry.maxntid} threads, launched with {setup.block}"
            )
    target = (program.module.parsed.target or "").rstrip("af")
    limit = SHARED_LIMIT_KB.get(target, 227) * 1024
    if program.static_shared > STATIC_SHARED_LIMIT:
        raise ValueError(
            f"{program.static_shared} bytes of static shared memory; "
            f"the limit is {STATIC_SHARED_LIMIT}"
        )
    if setup.shared_bytes > limit:
        raise ValueError(
            f"{setup.shared_bytes} bytes of shared memory per CTA; {target} has {limit}"
        )
    grid, block = setup.grid, setup.block
    if block[2] > 64 or max(grid[1:]) > 65535 or grid[0] >= 2**31 or min(grid) < 1:
        raise ValueError(f"grid {grid} or block {block} out of range")


def triple(size: int | Sequence[int]) -> tuple[int, ...]:
    """Returns a size with the dimensions that are missing filled up with ones."""
    sizes = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    return sizes + (1,) * (3 - len(sizes))


def launch(
    program: Program,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    checks: Checks | str | None = None,
    stats: bool = True,
    max_lanes: int | None = None,
    max_steps: int = 50_000_000,
    ctas: range | None = None,
) -> Stats:
    """Runs an entry and returns its counters.

    `shared_bytes` is dynamic shared memory, which is added to the static one. `max_lanes` bounds
    how many threads run together. `ctas` is a range of linear indices to run instead of all CTAs.
    """
    start = time.perf_counter()
    grid, block = triple(grid), triple(block)
    shared = program.static_shared + shared_bytes
    setup = Launch(
        grid,
        block,
        Checks.of(checks),
        bool(stats),
        shared_bytes,
        shared,
        max_steps,
        counts=[0] * len(program.code),
        stats=Stats(program.entry.name, grid, block, shared),
    )
    if not 1 <= setup.threads <= 1024:
        raise ValueError(f"block of {setup.threads} threads")
    check_limits(setup, program)
    device = program.module.device
    params, made = pack_args(program, args, device)
    setup.set_params(params)
    device.reset_footprint()
    try:
        with np.errstate(all="ignore"):
            _run_batches(program, setup, max_lanes or MAX_LANES, ctas)
        _note_footprint(setup.stats, device)
    finally:
        for address in made:
            device.free(address)
    _note_instructions(setup, program)
    setup.stats.seconds = time.perf_counter() - start
    return setup.stats


def _run_batches(program: Program, setup: Launch, max_lanes: int, ctas: range | None) -> None:
    todo = range(setup.grid[0] * setup.grid[1] * setup.grid[2]) if ctas is None else ctas
    lanes = align_up(setup.threads, 32)
    per_batch = max(1, max_lanes // lanes)
    bytes_per_cta = max(1, setup.shared_bytes * (3 + lanes // 32))
    per_batch = min(per_batch, max(1, BATCH_BYTES // bytes_per_cta))
    for cta in range(todo.start, todo.stop, per_batch):
        Batch(program, setup, cta, min(per_batch, todo.stop - cta)).run()
        setup.stats.batches += 1


def _note_footprint(stats: Stats, device: Device) -> None:
    for alloc in device.allocs:
        for touched, footprint in (
            (alloc.read, stats.footprint_read),
            (alloc.written, stats.footprint_written),
        ):
            if touched is not None:
                count = int(touched[: alloc.nbytes].sum())
                footprint[alloc.name] = footprint.get(alloc.name, 0) + count


def _note_instructions(setup: Launch, program: Program) -> None:
    stats = setup.stats
    stats.steps = setup.steps
    for pc, count in enumerate(setup.counts):
        if count:
            kind, ins = program.classes[pc], program.code[pc]
            stats.instructions[kind] = stats.instructions.get(kind, 0) + count
            opcode = "ret" if ins is None else ins.op
            stats.opcodes[opcode] = stats.opcodes.get(opcode, 0) + count
