# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Sorts instructions into the classes that the counters tell apart."""

from __future__ import annotations

from ..alu.table import ALU, SPECIAL
from ..memops.addressing import space_of
from ..syntax.elements import Instr
from ..warp.collectives import WARPOPS

# opcode -> class, where the opcode says it all
BY_OPCODE = {
    **dict.fromkeys(ALU, "alu"),
    **dict.fromkeys(SPECIAL, "sfu"),
    **dict.fromkeys(WARPOPS, "warp"),
    **dict.fromkeys(("bra", "brx", "ret", "exit"), "branch"),
    **dict.fromkeys(("atom", "red"), "atomic"),
    **{op: op for op in ("mma", "ldmatrix", "stmatrix", "cvt", "mov", "call")},
}


def counter_class(ins: Instr | None) -> str:
    """Returns the class of an instruction in `Stats.instructions`."""
    if ins is None:
        return "other"
    parts = ins.parts
    op = parts[0]
    if op == "wgmma":
        return op if parts[1] == "mma_async" else "async_wait"
    if op in ("ld", "ldu", "st"):
        space = space_of(parts)
        return f"{'st' if op == 'st' else 'ld'}_{'global' if space == 'generic' else space}"
    if op == "mbarrier":
        return "async_wait" if parts[1] in ("try_wait", "test_wait") else "barrier"
    if op == "cp":
        waits = {"wait_group", "wait_all", "commit_group"} & set(parts)
        return "async_wait" if waits else "cp_async"
    if op in ("bar", "barrier"):
        return "warp" if parts[1] == "warp" else "barrier"
    if op == "div" and parts[-1] in ("f32", "f64"):
        return "sfu"
    return BY_OPCODE.get(op, "other")
