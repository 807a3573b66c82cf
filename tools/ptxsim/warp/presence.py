# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks which lanes are present at an instruction that warps execute together.

A check returns the lanes that must wait for the others, None when none have to.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..compiling import Instr, Program, State
from ..errors import WarpSyncError
from ..lanes import full, warp_bits
from ..ptx_types import Array, u32
from ..syntax.elements import Imm, Operand

Precheck = Callable[[State], Array | None]
WHOLE_WARP = ("mma", "ldmatrix", "stmatrix", "movmatrix")
# position of the membermask
MEMBERMASK = {"shfl": 4, "vote": 2, "match": 2, "redux": 2, "elect": 1}


def precheck(program: Program, ins: Instr) -> Precheck | None:
    """Returns the check of a warp-synchronous instruction, None for any other."""
    op = ins.parts[0]
    if op in WHOLE_WARP:
        return pre_all(ins)
    if op == "bar" and ins.parts[1] == "warp":
        return pre_mask(program, ins, ins.args[0])
    if op in MEMBERMASK and "sync" in ins.parts:
        return pre_mask(program, ins, ins.args[MEMBERMASK[op]])
    return None


def pre_all(ins: Instr) -> Precheck:
    """Returns a check that asks for every lane of the warp."""

    def check(state: State) -> Array | None:
        if state.mask is None:
            return None
        mask = state.mask.reshape(-1, 32)
        incomplete = mask.any(1) & ~mask.all(1)
        if not incomplete.any():
            return None
        live = state.live.reshape(-1, 32)
        gone = incomplete & ~live.all(1)
        if gone.any():
            warp = int(np.argmax(gone))
            message = (
                f"{ins.parts[0]} needs all 32 lanes; lane {int(np.argmax(~live[warp]))} of the "
                "warp has exited or does not exist"
            )
            lane = warp * 32 + int(np.argmax(mask[warp]))
            state.fault(WarpSyncError, message, ins, None, lane)
        return np.repeat(incomplete, 32) & state.mask

    return check


def pre_mask(program: Program, ins: Instr, operand: Operand) -> Precheck:
    """Returns a check that asks for the lanes named by a membermask."""
    slot = program.src(operand, "b32", ins)
    names_all = isinstance(operand, Imm) and (operand.value & 0xFFFFFFFF) == 0xFFFFFFFF

    def check(state: State) -> Array | None:
        if state.mask is None and names_all:
            return None
        members = full(state, state.regs[slot])
        mask = state.active_mask()
        unnamed = mask & ((members >> state.laneid) & u32(1) == 0)
        if unnamed.any():
            k = int(np.argmax(unnamed))
            message = f"membermask {int(members[k]):#010x} does not name the executing lane"
            state.fault(WarpSyncError, message, ins, None, k)
        if state.checks.exited_at_barrier and state.live_n != state.start_n:
            _check_exited(state, ins, members, mask)
        present, live = (np.repeat(warp_bits(m), 32) for m in (mask, state.live))
        waiting = mask & ((members & live & ~present) != 0)
        return waiting if waiting.any() else None

    return check


def _check_exited(state: State, ins: Instr, members: Array, mask: Array) -> None:
    exited = state.exists & ~state.live
    bad = mask & ((members & np.repeat(warp_bits(exited), 32)) != 0)
    if bad.any():
        k = int(np.argmax(bad))
        lanes = np.flatnonzero(exited.reshape(-1, 32)[k // 32]).tolist()
        message = (
            f"membermask {int(members[k]):#010x} names lanes {lanes}, which have exited without "
            "reaching this instruction (allow with Checks(exited_at_barrier=False))"
        )
        state.fault(WarpSyncError, message, ins, None, k)


def pre_group(ins: Instr) -> Precheck:
    """Returns a check that asks for every lane of the warpgroup.

    That is four warps, the number of the first a multiple of four.
    """

    def check(state: State) -> Array | None:
        if state.mask is None and state.cta_warps % 4 == 0:
            return None
        whole = state.cta_warps // 4 * 4
        by_warp = (state.n_cta, state.cta_warps, 32)
        mask = state.active_mask().reshape(by_warp)
        beyond = mask & (np.arange(state.cta_warps) >= whole)[:, None]
        if beyond.any():
            k = int(np.argmax(beyond.reshape(-1)))
            message = (
                f"wgmma needs four warps; warp {k % state.cta_lanes // 32} is in no whole "
                f"warpgroup of a CTA of {state.cta_warps} warps"
            )
            state.fault(WarpSyncError, message, ins, None, k)
        groups = mask[:, :whole].reshape(-1, 128)
        incomplete = groups.any(1) & ~groups.all(1)
        if not incomplete.any():
            return None
        waiting = np.zeros(by_warp, bool)
        waiting[:, :whole] = (groups & incomplete[:, None]).reshape(state.n_cta, whole, 32)
        waiting = waiting.reshape(-1)
        live = state.live.reshape(by_warp)[:, :whole].reshape(-1, 128)
        if (incomplete & ~live.all(1)).any():
            message = (
                f"{ins.op} needs all 128 threads of the warpgroup; some have exited or do not exist"
            )
            state.fault(WarpSyncError, message, ins, None, int(np.argmax(waiting)))
        return waiting

    return check
