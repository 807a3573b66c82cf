# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Executes a batch of CTAs.

A group is a set of lanes with the same call stack and pc. The group with the deepest stack and the
lowest pc runs first, which makes divergent paths meet again at the end of a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import SimError, WatchdogError, unsupported
from ..ptx_types import Array
from .barriers import BarrierState, Key, Stack
from .program import BAR, BRA, BRX, CALL, EXIT, PLAIN, RET, WARP, ExternalCall

SLICE = 20000  # steps before a waiting group gets its turn
SPIN = 64  # ... or this many polls of memory, so that spin loops end soon
NOWHERE = 1 << 60


@dataclass
class Group:
    """Describes the group that runs."""

    stack: Stack
    mask: Array
    n: int  # lanes
    n_warps: int


class Batch(BarrierState):
    """Runs one batch of CTAs to its end."""

    def run(self) -> None:
        """Executes the program until every lane has exited."""
        self.next_fair = self.steps + SLICE
        self.add(((), self.program.base[self.program.entry.name]), self.live.copy())
        while self.runnable:
            key, fair = self._pick()
            self._run_group(key, fair)
        if self.blocked or self.parked:
            self.stuck()
        self.launch.steps = self.steps
        self.stats.mma_flops += self.mma_flops

    def _pick(self) -> tuple[Key, bool]:
        """Returns the group that runs next, and whether it is its turn after a long wait."""
        keys = list(self.runnable)
        if len(keys) == 1:
            return keys[0], False
        if self.spin >= SPIN or self.steps >= self.next_fair:
            self.spin = 0
            self.next_fair = self.steps + SLICE
            return min(keys, key=lambda key: self.since[key]), True
        return min(keys, key=lambda key: (-len(key[0]), key[1])), False

    def _start(self, key: Key) -> Group:
        """Takes a group out of those that wait, and makes its lanes the active ones."""
        mask = self.runnable.pop(key)
        del self.since[key]
        if key in self.parked:
            mask = mask | self.parked.pop(key)
        n = int(np.count_nonzero(mask))
        if n == self.n_lanes:
            self.set_mask(None, None)
            return Group(key[0], mask, n, self.n_warps)
        self.set_mask(mask, None if n == self.live_n else mask)
        return Group(key[0], mask, n, int(mask.reshape(-1, 32).any(1).sum()))

    def _limit(self, key: Key, fair: bool) -> int:
        """Returns the pc at which the group has to wait for another one that is behind it."""
        stack, pc = key
        limit = NOWHERE
        if not fair:
            same_depth = (p for s, p in self.runnable if len(s) == len(stack))
            limit = min(same_depth, default=NOWHERE)
        if self.parked:
            limit = min([limit] + [p for s, p in self.parked if s == stack and p > pc])
        return limit

    def _run_group(self, key: Key, fair: bool) -> None:
        """Runs a group until it ends, splits, waits, or has to let another one run."""
        group = self._start(key)
        limit = self._limit(key, fair)
        stack, pc = key
        program, counts, n_warps = self.program, self.launch.counts, group.n_warps
        kinds, functions, guards = program.kinds, program.functions, program.guards
        end = self.steps + SLICE
        while pc < limit:
            self.steps += 1
            if self.steps >= end:
                self._watch_steps(pc, group)
                end = self.steps + SLICE
                if self.runnable:
                    break
            counts[pc] += n_warps
            guard = guards[pc]
            if kinds[pc] != PLAIN:
                following = self._control(group, pc)
                if following is None:
                    return
                pc = following
                continue
            if guard is None:
                functions[pc](self)
            else:
                self._run_guarded(group, pc)
            pc += 1
        self.add((stack, pc), group.mask)

    def _watch_steps(self, pc: int, group: Group) -> None:
        if self.steps > self.launch.max_steps:
            ins = self.program.instruction(pc)
            message = f"more than {self.launch.max_steps} steps"
            self.fault(WatchdogError, message, ins, None, int(np.argmax(group.mask)))

    def _taking(self, group: Group, pc: int) -> tuple[Array, int]:
        """Returns the lanes whose guard lets them execute an instruction, and their number."""
        guard = self.program.guards[pc]
        if guard is None:
            return group.mask, group.n
        slot, negated = guard
        value = self.regs[slot]
        if negated:
            value = ~value
        if len(value) == 1:
            return group.mask, group.n if value[0] else 0
        taking = value if self.mask is None else value & group.mask
        n = int(np.count_nonzero(taking))
        return (group.mask if n == group.n else taking), n

    def _run_guarded(self, group: Group, pc: int) -> None:
        taking, n = self._taking(group, pc)
        if n == group.n:
            self.program.functions[pc](self)
        elif n:
            self.push_mask(taking)
            self.program.functions[pc](self)
            self.pop_mask()

    # -- control flow: each returns the pc at which the group goes on, or None when it does not
    def _control(self, group: Group, pc: int) -> int | None:
        taking, n = self._taking(group, pc)
        if n == 0:
            return pc + 1
        rest = None if n == group.n else group.mask & ~taking
        return CONTROL[self.program.kinds[pc]](self, group, pc, taking, rest)

    def _branch(self, group: Group, pc: int, taking: Array, rest: Array | None) -> int | None:
        target = self.program.info[pc]
        if rest is None:
            if self.spin >= SPIN and self.runnable and target <= pc:
                self.add((group.stack, target), group.mask)
                return None
            return target
        split = taking.reshape(-1, 32).any(1) & rest.reshape(-1, 32).any(1)
        self.stats.divergent_branches += int(split.sum())
        self.add((group.stack, target), taking)
        self.add((group.stack, pc + 1), rest)
        return None

    def _branch_indexed(
        self, group: Group, pc: int, taking: Array, rest: Array | None
    ) -> int | None:
        slot, targets = self.program.info[pc]
        index = np.broadcast_to(self.regs[slot], (self.n_lanes,))
        for k in np.unique(index[taking]):
            mask = taking & (index == k)
            if k >= len(targets):
                message = f"brx.idx index {int(k)} of {len(targets)}"
                self.fault(
                    SimError, message, self.program.instruction(pc), None, int(np.argmax(mask))
                )
            self.add((group.stack, targets[int(k)]), mask)
        return self._leave(group, pc, rest)

    def _warp_synchronous(
        self, group: Group, pc: int, taking: Array, rest: Array | None
    ) -> int | None:
        """Executes an instruction for the warps that are complete; other lanes wait for theirs."""
        if rest is not None:
            self.push_mask(taking)
        waiting = self.program.prechecks[pc](self)
        if waiting is None:
            self.program.functions[pc](self)
            if rest is not None:
                self.pop_mask()
            return pc + 1
        if rest is not None:
            self.pop_mask()
        key = (group.stack, pc)
        old = self.parked.pop(key, None)
        if old is None:
            self.parked[key] = waiting
        else:  # more lanes than before: look again together
            self.add(key, old | waiting)
        taking = taking & ~waiting
        if taking.any():
            self.set_mask(taking, taking)
            self.program.functions[pc](self)
        else:
            self.launch.counts[pc] -= group.n_warps
        following = group.mask & ~waiting
        return self._leave(group, pc, following if following.any() else None)

    def _barrier(self, group: Group, pc: int, taking: Array, rest: Array | None) -> int | None:
        if rest is not None:
            self.set_mask(taking, taking)
        program = self.program
        if self.barrier((group.stack, pc), taking, program.instruction(pc), program.info[pc]):
            return pc + 1
        return self._leave(group, pc, rest)

    def _exit(self, group: Group, pc: int, taking: Array, rest: Array | None) -> int | None:
        self.exit_lanes(taking)
        return self._leave(group, pc, rest)

    def _call(self, group: Group, pc: int, taking: Array, rest: Array | None) -> int | None:
        program, call = self.program, self.program.info[pc]
        if isinstance(call, ExternalCall):
            self.push_mask(taking)
            call.function(self, program.instruction(pc), call.arguments, call.results)
            self.pop_mask()
            return pc + 1
        if any(call.target == program.info[caller].target for _, caller in group.stack):
            raise unsupported(program.instruction(pc), "recursion")
        self._copy_buffers(call.arguments, taking)
        self.add(((*group.stack, (pc + 1, pc)), call.target), taking)
        return self._leave(group, pc, rest)

    def _return(self, group: Group, pc: int, taking: Array, rest: Array | None) -> int | None:
        back, caller = group.stack[-1]
        self._copy_buffers(self.program.info[caller].results, taking)
        self.add((group.stack[:-1], back), taking)
        return self._leave(group, pc, rest)

    def _copy_buffers(self, copies: list[tuple[int, int]], taking: Array) -> None:
        for source, target in copies:
            self.buffers[target][taking] = self.buffers[source][taking]

    def _leave(self, group: Group, pc: int, rest: Array | None) -> int | None:
        """Ends the turn of a group; lanes that do not take part go on later."""
        if rest is not None:
            self.add((group.stack, pc + 1), rest)
        return None


CONTROL = {
    BRA: Batch._branch,
    BRX: Batch._branch_indexed,
    RET: Batch._return,
    EXIT: Batch._exit,
    CALL: Batch._call,
    BAR: Batch._barrier,
    WARP: Batch._warp_synchronous,
}
