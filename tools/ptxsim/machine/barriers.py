# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Barriers of a CTA: who waits, when they are complete, and what goes wrong at them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..errors import BarrierDivergenceError, DeadlockError, SimError, WarpSyncError, unsupported
from ..ptx_types import Array, i64, u32
from .state import State

if TYPE_CHECKING:
    from ..syntax.elements import Instr
    from .launch import Launch
    from .program import Program

Stack = tuple[tuple[int, int], ...]
Key = tuple[Stack, int]  # call stack and pc: what the lanes of a group have in common


class BarrierOperands(NamedTuple):
    """Holds the operands of a barrier instruction, as slots of registers."""

    mode: str  # sync, arrive or red
    ident: int
    expected: int | None  # number of threads; None for all of the CTA
    reduction: str | None
    dst: int  # of a reduction
    vote: Callable[[Any], Array] | None


@dataclass
class Arrival:
    """Records lanes that have reached a barrier and wait for the others."""

    ident: int
    mask: Array
    stack: Stack
    pc: int
    ins: Instr
    operands: BarrierOperands
    count: int | None
    votes: Array | None


class BarrierState(State):
    """Adds groups of lanes, and barriers at which they wait, to the state of a batch."""

    def __init__(self, program: Program, launch: Launch, cta0: int, n_cta: int) -> None:
        super().__init__(program, launch, cta0, n_cta)
        self.blocked: list[Arrival] = []
        self.parked: dict[Key, Array] = {}  # lanes that wait for the rest of their warp
        self.runnable: dict[Key, Array] = {}
        self.since: dict[Key, int] = {}  # the step at which a group became runnable

    def add(self, key: Key, mask: Array) -> None:
        """Makes lanes runnable, together with those that are at the same place already."""
        old = self.runnable.get(key)
        self.runnable[key] = mask if old is None else old | mask
        self.since.setdefault(key, self.steps)

    def exit_lanes(self, mask: Array) -> None:
        """Ends these lanes, and wakes up the lanes that may have waited for them."""
        self.live = self.live & ~mask
        self.live_cta -= self.per_cta(mask)
        self.live_n = int(self.live_cta.sum())
        for key in list(self.parked):
            self.add(key, self.parked.pop(key))
        if self.blocked:
            self.check_barriers()

    def per_cta(self, mask: Array) -> Array:
        """Counts lanes by CTA."""
        return np.bincount(self.lane_cta[mask], minlength=self.n_cta)

    # -- arrival
    def barrier(self, key: Key, mask: Array, ins: Instr, operands: BarrierOperands) -> bool:
        """Lets lanes arrive at a barrier. Returns True when they may go straight on."""
        ids = self.regs[operands.ident]
        if len(ids) == 1:
            ident = int(ids[0])
        else:
            values = np.unique(ids[mask])
            if len(values) > 1:
                for value in values:
                    self._arrive(key, mask & (ids == value), ins, operands, int(value))
                return False
            ident = int(values[0])
        everyone = self.mask is None and operands.mode == "sync" and not self.blocked
        if everyone and (
            operands.expected is None or (self.regs[operands.expected] == self.cta_lanes).all()
        ):
            self.shared.sync_all()
            return True
        self._arrive(key, mask, ins, operands, ident)
        return False

    def _arrive(
        self, key: Key, mask: Array, ins: Instr, operands: BarrierOperands, ident: int
    ) -> None:
        stack, pc = key
        count = self._expected_count(mask, ins, operands)
        votes = None
        if operands.vote is not None:
            votes = np.broadcast_to(operands.vote(self.regs), (self.n_lanes,)).copy()
        self.blocked.append(Arrival(ident, mask.copy(), stack, pc, ins, operands, count, votes))
        if operands.mode == "arrive":
            self.add((stack, pc + 1), mask)
        self.check_barriers(ident)

    def _expected_count(self, mask: Array, ins: Instr, operands: BarrierOperands) -> int | None:
        if operands.expected is None:
            return None
        counts = self.regs[operands.expected]
        counts = counts if len(counts) == 1 else np.unique(counts[mask])
        if len(counts) != 1:
            raise unsupported(ins, "different barrier counts in one step")
        count = int(counts[0])
        if count == 0 or count % 32:
            message = f"barrier count {count} is not a positive multiple of 32"
            self.fault(SimError, message, ins, None, int(np.argmax(mask)))
        return count

    # -- completion
    def check_barriers(self, only: int | None = None) -> None:
        """Releases the lanes whose barrier is complete: at all barriers, or at one."""
        for ident in sorted({a.ident for a in self.blocked} if only is None else {only}):
            arrivals = [a for a in self.blocked if a.ident == ident]
            if arrivals:
                self._check_barrier(ident, arrivals)

    def _check_barrier(self, ident: int, arrivals: list[Arrival]) -> None:
        done = self._complete_ctas(arrivals)
        if not done.any():
            return
        lanes_done = done[self.lane_cta]
        self._check_divergence(ident, arrivals, lanes_done)
        met = np.logical_or.reduce([a.mask for a in arrivals]) & lanes_done
        if self.shared.race:
            self.shared.sync_some(np.unique(self.warp_of[met]))
        for arrival in arrivals:
            if arrival.operands.reduction is not None:
                self._reduce(arrivals, arrival, lanes_done, met)
        for arrival in arrivals:
            released = arrival.mask & lanes_done
            if released.any():
                arrival.mask = arrival.mask & ~lanes_done
                if arrival.operands.mode != "arrive":
                    self.add((arrival.stack, arrival.pc + 1), released)
        self.blocked = [a for a in self.blocked if a.mask.any()]

    def _complete_ctas(self, arrivals: list[Arrival]) -> Array:
        """Returns for each CTA whether all that the barrier waits for have arrived."""
        arrived = np.zeros(self.n_cta, i64)
        warps = np.zeros(self.n_warps, i64)
        want = np.zeros(self.n_cta, i64)
        counted = np.zeros(self.n_cta, bool)
        for arrival in arrivals:
            present = self.per_cta(arrival.mask)
            arrived += present
            warps += arrival.mask.reshape(-1, 32).any(1)  # a warp counts once per arrival
            if arrival.count is not None:
                here = present > 0
                want[here] = arrival.count
                counted |= here
        by_warp = warps.reshape(self.n_cta, self.cta_warps).sum(1) * 32
        got = np.where(counted, by_warp, arrived)
        return (arrived > 0) & (got >= np.where(counted, want, self.live_cta))

    def _check_divergence(self, ident: int, arrivals: list[Arrival], lanes_done: Array) -> None:
        """Finds CTA-wide barriers met at different instructions, or not by all threads."""
        first = np.full(self.n_cta, -1)
        for arrival in arrivals:
            here = np.unique(self.lane_cta[arrival.mask & lanes_done])
            if arrival.count is not None:
                continue
            clash = here[(first[here] >= 0) & (first[here] != arrival.pc)]
            parts = arrival.ins.parts
            if parts[0] == "barrier" and "aligned" not in parts:
                clash = clash[:0]  # specialised warps meet at barriers of their own code
            if len(clash):
                other = self.program.instruction(first[clash[0]])
                message = (
                    f"threads of one CTA meet barrier {ident} at different instructions: "
                    f"PTX lines {other.line} and {arrival.ins.line}"
                )
                self._fault_in_cta(message, arrival, int(clash[0]))
            first[here] = arrival.pc
            short = here[self.live_cta[here] < self.cta_threads]
            if self.checks.exited_at_barrier and len(short):
                message = (
                    f"only {int(self.live_cta[short[0]])} of {self.cta_threads} threads reach "
                    f"barrier {ident}; the others have exited "
                    "(allow with Checks(exited_at_barrier=False))"
                )
                self._fault_in_cta(message, arrival, int(short[0]))

    def _fault_in_cta(self, message: str, arrival: Arrival, cta: int) -> NoReturn:
        lane = int(np.argmax(arrival.mask & (self.lane_cta == cta)))
        self.fault(BarrierDivergenceError, message, arrival.ins, None, lane)

    def _reduce(
        self, arrivals: list[Arrival], arrival: Arrival, lanes_done: Array, met: Array
    ) -> None:
        votes = np.zeros(self.n_cta, i64)
        for other in arrivals:
            if other.votes is not None:
                votes += self.per_cta(other.mask & lanes_done & other.votes)
        if arrival.operands.reduction == "popc":
            value = votes[self.lane_cta].astype(u32)
        elif arrival.operands.reduction == "and":
            value = (votes == self.per_cta(met))[self.lane_cta]
        else:
            value = (votes > 0)[self.lane_cta]
        dst = arrival.operands.dst
        self.regs[dst] = np.where(arrival.mask & lanes_done, value, self.regs[dst])

    # -- nobody can run
    def stuck(self) -> NoReturn:
        """Raises the error that explains why no lane can run."""
        for (_, pc), mask in self.parked.items():
            self._fault_parked(self.program.instruction(pc), mask)
        arrival = self.blocked[0]
        lane = int(np.argmax(arrival.mask))
        cta = int(self.lane_cta[lane])
        lines = []
        for other in self.blocked:
            n = int((other.mask & (self.lane_cta == cta)).sum())
            if n:
                count = f", count {other.count}" if other.count else ""
                lines.append(
                    f"{n} threads at barrier {other.ident} (PTX line {other.ins.line}{count})"
                )
        message = (
            f"deadlock: {'; '.join(lines)}; {int(self.live_cta[cta])} of {self.cta_threads} "
            "threads are alive and none can run"
        )
        self.fault(DeadlockError, message, arrival.ins, None, lane)

    def _fault_parked(self, ins: Instr, mask: Array) -> NoReturn:
        lane = int(np.argmax(mask))
        warp = int(self.warp_of[lane])
        here = mask.reshape(-1, 32)[warp]
        if ins.parts[0] == "wgmma":
            group = warp - warp % self.cta_warps % 4
            warps = [
                k - group for k in range(group, group + 4) if not mask.reshape(-1, 32)[k].all()
            ]
            message = (
                f"{'.'.join(ins.parts[:2])} never reached by warps {warps} of the warpgroup, "
                "which it needs whole"
            )
            self.fault(WarpSyncError, message, ins, None, lane)
        missing = np.flatnonzero(self.live.reshape(-1, 32)[warp] & ~here).tolist()
        message = (
            f"warp-synchronous instruction never reached by lanes {missing} that it needs "
            f"(lanes {np.flatnonzero(here).tolist()} wait)"
        )
        self.fault(WarpSyncError, message, ins, None, lane)
