// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launches: every thread of a block as a fiber, one block after the other; included by fibers.h.

#pragma once

#include "fiber_sync.h"

namespace fibers {

// The body of every fiber: runs the kernel once per block.
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
    __asan_unpoison_memory_region(m.stacks, count * kStackBytes);  // frames left behind
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

// Where this is set, it is called before every launch, with the kernel and each of its `count`
// arguments, and returns whether it has executed the launch itself.
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
    create_threads(unsigned(m.threads.size()));  // the failed launch left them in the middle
    throw std::runtime_error(m.error);
}

}  // namespace fibers
