// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Tells a simulator that executes launches itself (simulate.py) the names of kernels, and which
// memory torch has allocated.

#include <c10/core/Allocator.h>
#include <dlfcn.h>

#include <map>

namespace {

using Callback = bool (*)(const char* symbol, unsigned grid, unsigned block, size_t shared_bytes,
                          int count, const void* const* arguments, const size_t* bytes);
Callback callback = nullptr;

bool name_and_call(const void* kernel, unsigned grid, unsigned block, size_t shared_bytes,
                   int count, const void* const* arguments, const size_t* bytes) {
    Dl_info found = {};
    dladdr(kernel, &found);
    return callback(found.dli_sname ? found.dli_sname : "a kernel without external linkage", grid,
                    block, shared_bytes, count, arguments, bytes);
}

// The allocations of torch, and how to free them.
struct Allocation {
    size_t bytes;
    c10::DataPtr owner;
};
std::map<void*, Allocation> allocated;

struct Recorder final : c10::Allocator {
    c10::Allocator* inner = nullptr;

    static void forget(void* pointer) { allocated.erase(pointer); }

    c10::DataPtr allocate(size_t bytes) override {
        c10::DataPtr owner = inner->allocate(bytes);
        void* const pointer = owner.get();
        const c10::Device device = owner.device();
        if (pointer == nullptr) return owner;
        allocated[pointer] = {bytes, std::move(owner)};
        return {pointer, pointer, forget, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return forget; }
    void copy_data(void* to, const void* from, size_t bytes) const override {
        default_copy_data(to, from, bytes);
    }
};
Recorder recorder;

}  // namespace

extern "C" {

void intercept_launches(Callback take) {
    callback = take;
    fibers::intercept = take ? name_and_call : nullptr;
}

void record_allocations(int on) {
    constexpr uint8_t kFirst = 255;
    if (!recorder.inner) recorder.inner = c10::GetAllocator(c10::kCPU);
    c10::SetAllocator(c10::kCPU, on ? &recorder : recorder.inner, kFirst);
}

// Returns the number of allocations; writes addresses and sizes of the first `count`.
size_t allocations(size_t* addresses, size_t* sizes, size_t count) {
    size_t i = 0;
    for (const auto& [address, allocation] : allocated) {
        if (i == count) break;
        addresses[i] = reinterpret_cast<size_t>(address);
        sizes[i++] = allocation.bytes;
    }
    return allocated.size();
}

}  // extern "C"
