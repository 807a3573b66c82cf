// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The state of the launch that runs, and the switch from one fiber to another; included by
// fibers.h.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x = 1;
    dim3(unsigned x = 1) : x(x) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kMostShared = 227 << 10;
constexpr unsigned kPoison = 0xFF;  // NaN in every floating-point type, -1 as an integer

inline int multiprocessors = 3;  // for launchers that fill the device
inline std::minstd_rand random{20260};

struct Copy {
    char* to;
    const void* from;
    unsigned bytes, source_bytes;
    unsigned group;
};

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    char* stack = nullptr;
    size_t stack_bytes = 0;
    bool started = false, done = false;
    const char* waits_at = nullptr;
    int line = 0;
    std::vector<Copy> copies;  // in flight
    unsigned groups = 0;       // committed
    void* sanitizer = nullptr;
};

struct Warp {
    uint32_t runnable = ~0U, exited = 0;
    uint32_t met = 0;  // lanes that wait for the others at a warp operation
    unsigned priority = unsigned(random());
    void* operands[32];
};

// The launch that runs. Blocks run one after the other.
struct Machine {
    std::mutex mutex;
    std::function<void()> kernel;
    const char* name = "";
    char* stacks = nullptr;
    std::vector<Fiber> threads;
    std::vector<Warp> warps;
    unsigned count = 0, live = 0, at_barrier = 0, first_at_barrier = 0;
    unsigned current = 0;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    Fiber host;  // the launching thread
    bool running = false;
    std::string error;
};

inline Machine machine;

inline Fiber& self() {
    return machine.threads[machine.current];
}
inline unsigned lane() {
    return machine.current % 32;
}

inline std::string where(const Fiber& f) {
    return "thread " + std::to_string(&f - machine.threads.data()) + " at " + f.waits_at +
           (f.line ? " of line " + std::to_string(f.line) : "");
}

// Tell address sanitizer of every change of stacks.
inline void leave([[maybe_unused]] Fiber& from, [[maybe_unused]] const Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#endif
}
inline void arrive([[maybe_unused]] Fiber& at) {
#if defined(__SANITIZE_ADDRESS__)
    Fiber& host = machine.host;
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(at.sanitizer, &stack, &bytes);
    if (host.stack) return;
    host.stack = static_cast<char*>(const_cast<void*>(stack));  // the first fiber comes from there
    host.stack_bytes = bytes;
#endif
}

// Continues where `to` left off. Returns when it is the turn of `from` again.
__attribute__((noinline)) inline void switch_context(Fiber& from, Fiber& to) {
    leave(from, to);
    if (_setjmp(from.context) == 0) {
        if (to.started) _longjmp(to.context, 1);
        to.started = true;
        setcontext(&to.start);
    }
    arrive(from);
}

// Ends the launch; frames of the fibers are abandoned, as they hold nothing.
[[noreturn]] inline void fail(const std::string& what) {
    if (!machine.running) throw std::runtime_error(what);
    machine.error = std::string(machine.name) + ": block " + std::to_string(blockIdx.x) +
                    " thread " + std::to_string(threadIdx.x) + ": " + what;
    switch_context(self(), machine.host);
    __builtin_unreachable();
}

inline void switch_to(unsigned next) {
    const unsigned me = machine.current;
    if (next == me) return;
    machine.current = next;
    switch_context(machine.threads[me], machine.threads[next]);
    threadIdx.x = me;
}

}  // namespace fibers
