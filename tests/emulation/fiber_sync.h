// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Where fibers wait for each other: block barriers, and operations of a whole warp; included by
// fibers.h.

#pragma once

#include "fiber_machine.h"

namespace fibers {

[[noreturn]] inline void report_deadlock() {
    std::string all = "deadlock";
    const char* before = nullptr;
    for (unsigned i = 0; i < machine.count; ++i) {
        const Fiber& f = machine.threads[i];
        if (!f.done && f.waits_at != before) all += "; " + where(f);
        before = f.done ? nullptr : f.waits_at;
    }
    fail(all);
}

// Lets another fiber run, or this one if it can: all lanes of a warp before another warp.
inline void yield() {
    Warp* warp = &machine.warps[machine.current / 32];
    if (warp->runnable == 0) {
        for (Warp& other : machine.warps) {
            if (other.runnable && (!warp->runnable || other.priority > warp->priority)) {
                warp = &other;
            }
        }
        if (warp->runnable == 0) report_deadlock();
    }
    const unsigned turn = random() % 32;
    const uint32_t rotated = warp->runnable >> turn | uint64_t(warp->runnable) << 32 >> turn;
    const unsigned lane = (__builtin_ctz(rotated) + turn) % 32;
    switch_to(unsigned(warp - machine.warps.data()) * 32 + lane);
}

inline void wait_at(const char* what, int line) {
    self().waits_at = what;
    self().line = line;
    machine.warps[machine.current / 32].runnable &= ~(1U << lane());
}

// Waits for all threads of the block.
inline void barrier(const char* name, int line) {
    Machine& m = machine;
    if (m.live != m.count) {
        fail(std::string(name) + " of line " + std::to_string(line) + ": " +
             std::to_string(m.count - m.live) + " threads of the block have exited");
    }
    if (m.at_barrier == 0) m.first_at_barrier = m.current;
    wait_at(name, line);
    const Fiber& first = m.threads[m.first_at_barrier];
    if (first.waits_at != name || first.line != line) {
        fail("divergent barriers: " + where(self()) + ", " + where(first));
    }
    if (++m.at_barrier == m.count) {
        m.at_barrier = 0;
        for (Warp& warp : m.warps) {
            warp.runnable = ~0U;
            warp.priority = unsigned(random());
        }
    }
    yield();
}

// Waits for the other lanes of the warp. The last lane that arrives runs `compute` over the
// operands of all lanes, which may change them.
template <class Operands, class F>
void warp(const char* name, Operands& mine, F compute, int line = 0) {
    Warp& warp = machine.warps[machine.current / 32];
    if (warp.exited) fail(std::string(name) + ": lanes of the warp have exited");
    warp.operands[lane()] = &mine;
    wait_at(name, line);
    if (warp.met) {
        const Fiber& other = machine.threads[machine.current / 32 * 32 + __builtin_ctz(warp.met)];
        if (other.waits_at != name || other.line != line) {
            fail("divergent warp: " + where(self()) + ", " + where(other));
        }
    }
    warp.met |= 1U << lane();
    if (warp.met == ~0U) {
        Operands* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Operands*>(warp.operands[i]);
        compute(lanes);
        warp.met = 0;
        warp.runnable = ~0U;
    }
    yield();
}

}  // namespace fibers
