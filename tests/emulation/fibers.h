// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// CUDA C++ on the host: g++ -x c++ -include fibers.h compiles kernels without any CUDA header, and
// fibers::launch runs each CUDA thread of a block as a fiber.
//
// Schedules are adversarial, so that a missing barrier shows as a wrong result: between two block
// barriers one warp, drawn at random, runs as far as it can before the next one starts, its lanes
// in random order. Shared memory holds NaN bytes when a block starts, and so does the destination
// of an asynchronous copy until the wait that promises it. Reported, with block and thread:
// barriers that some threads miss or meet elsewhere, warp operations without all of their lanes,
// deadlock, copies that nobody waited for, shared addresses out of bounds or misaligned.
//
// Not modelled: grids and blocks of more than one dimension, static __shared__ arrays, operations
// of a part of a warp, atomics, caches and memory order between warps, time.

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

#define MK_ON_HOST 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

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

// the launch that is running; blocks run one after the other
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
    Fiber host;  // who launches
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

// Address sanitizer wants to know every change of stacks.
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

// Goes on where `to` left off; comes back, through `from`, when its turn has come.
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

// Lets another fiber run, or this one if it can: the lanes of a warp before those of another.
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

// Meets all threads of the block.
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

// Meets the other lanes. In the last to come, `compute` runs over the operands of all; the others
// find theirs changed.
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

// --- memory of the block

inline void* shared_memory() {
    return machine.shared;
}

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - machine.shared);
}

inline void* at_shared(uint32_t address, unsigned bytes) {
    if (address % bytes || address + uint64_t(bytes) > machine.shared_bytes) {
        fail("shared address " + std::to_string(address) + ": expected " + std::to_string(bytes) +
             " aligned bytes within " + std::to_string(machine.shared_bytes));
    }
    return machine.shared + address;
}

inline void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
    if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes > bytes) {
        fail("asynchronous copy of " + std::to_string(source_bytes) + " into " +
             std::to_string(bytes) + " bytes");
    }
    if (reinterpret_cast<uintptr_t>(global) % bytes) {
        fail("asynchronous copy from an address that is not aligned to its " +
             std::to_string(bytes) + " bytes");
    }
    char* to = static_cast<char*>(at_shared(shared_address(shared), bytes));
    memset(to, kPoison, bytes);
    self().copies.push_back({to, global, bytes, source_bytes, self().groups});
}

inline void commit_async() {
    ++self().groups;
}

// Of the committed groups all but the latest have landed.
inline void wait_async(unsigned groups_left) {
    auto landed = self().copies.begin();
    for (; landed != self().copies.end(); ++landed) {
        if (landed->group + groups_left >= self().groups) break;
        memcpy(landed->to, landed->from, landed->source_bytes);
        memset(landed->to + landed->source_bytes, 0, landed->bytes - landed->source_bytes);
    }
    self().copies.erase(self().copies.begin(), landed);
}

// --- blocks and launches

// What a fiber does: one thread after the other, as blocks come.
inline void live() {
    arrive(self());
    for (;;) {
        threadIdx.x = machine.current;
        machine.kernel();
        Warp& warp = machine.warps[machine.current / 32];
        const uint32_t me = 1U << lane();
        if (!self().copies.empty()) fail("exits with asynchronous copies that it did not wait for");
        if (warp.met || machine.at_barrier) {
            const unsigned first = machine.current / 32 * 32 + __builtin_ctz(warp.met | 1U << 31);
            const unsigned other = warp.met ? first : machine.first_at_barrier;
            fail("exits before others: " + where(machine.threads[other]));
        }
        self().done = true;
        warp.exited |= me;
        warp.runnable &= ~me;
        if (--machine.live == 0) {
            switch_context(self(), machine.host);
        } else {
            yield();
        }
    }
}

inline void create_threads(unsigned count) {
    Machine& m = machine;
    if (m.stacks) munmap(m.stacks, m.threads.size() * kStackBytes);
    m.stacks = static_cast<char*>(mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(m.stacks, count * kStackBytes);  // of frames left behind
#endif
    m.threads = std::vector<Fiber>(count);
    for (unsigned i = 0; i < count; ++i) {
        char* stack = m.stacks + i * kStackBytes;
        mprotect(stack, kPage, PROT_NONE);  // an overflow does not run into the next stack
        m.threads[i].stack = stack + kPage;
        m.threads[i].stack_bytes = kStackBytes - kPage;
        ucontext_t& start = m.threads[i].start;
        getcontext(&start);
        start.uc_stack.ss_sp = m.threads[i].stack;
        start.uc_stack.ss_size = m.threads[i].stack_bytes;
        start.uc_link = nullptr;
        makecontext(&start, live, 0);
    }
}

inline void run_block() {
    Machine& m = machine;
    m.live = m.count;
    m.at_barrier = 0;
    memset(m.shared, kPoison, m.shared_bytes);
    m.warps.clear();
    m.warps.resize(m.count / 32);
    for (unsigned i = 0; i < m.count; ++i) {
        m.threads[i].done = false;
        m.threads[i].groups = 0;
    }
    m.current = unsigned(random() % m.count);
    switch_context(m.host, self());
}

// Hears of every launch, if it is set, and may take it over: of the kernel, and of each of its
// `count` arguments and its size.
using Intercept = bool (*)(const void* kernel, unsigned grid, unsigned block, size_t shared_bytes,
                           int count, const void* const* arguments, const size_t* bytes);
inline Intercept intercept = nullptr;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments... arguments) {
    Machine& m = machine;
    const std::lock_guard<std::mutex> lock(m.mutex);
    if (grid.x == 0 || grid.x > 0x7FFFFFFF || block.x == 0 || block.x % 32 || block.x > 1024 ||
        shared_bytes > kMostShared) {
        throw std::runtime_error(std::string(name) + ": cannot be launched as " +
                                 std::to_string(grid.x) + " blocks of " + std::to_string(block.x) +
                                 " threads and " + std::to_string(shared_bytes) + " bytes");
    }
    const std::tuple<Parameters...> converted(arguments...);
    const auto heard = [&](const auto&... each) {
        const void* const pointers[] = {&each...};
        const size_t bytes[] = {sizeof each...};
        return intercept(reinterpret_cast<const void*>(kernel), grid.x, block.x, shared_bytes,
                         sizeof...(each), pointers, bytes);
    };
    if (intercept && std::apply(heard, converted)) return;
    if (m.threads.size() < block.x) create_threads(block.x);
    void* shared = nullptr;  // exactly as large as asked for, so that sanitizers see its end
    if (posix_memalign(&shared, 1024, shared_bytes)) throw std::bad_alloc();
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), random);
    m.name = name;
    m.kernel = [&] { std::apply(kernel, converted); };
    m.count = block.x;
    m.shared = static_cast<char*>(shared);
    m.shared_bytes = shared_bytes;
    m.error.clear();
    m.running = true;
    m.host.started = true;
    m.host.stack = nullptr;  // the caller may be another thread than the last time
    blockDim = block;
    gridDim = grid;
    for (unsigned i : order) {
        blockIdx.x = i;
        run_block();
        if (!m.error.empty()) break;
    }
    m.running = false;
    std::free(shared);
    if (m.error.empty()) return;
    create_threads(unsigned(m.threads.size()));  // those abandoned in the middle
    throw std::runtime_error(m.error);
}

}  // namespace fibers

#include "cuda_names.h"
