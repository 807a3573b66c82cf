// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Shared memory of a block, and the asynchronous copies into it; included by fibers.h.

#pragma once

#include "fiber_machine.h"

namespace fibers {

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

// Completes the committed groups of copies but for the latest `groups_left`.
inline void wait_async(unsigned groups_left) {
    auto landed = self().copies.begin();
    for (; landed != self().copies.end(); ++landed) {
        if (landed->group + groups_left >= self().groups) break;
        memcpy(landed->to, landed->from, landed->source_bytes);
        memset(landed->to + landed->source_bytes, 0, landed->bytes - landed->source_bytes);
    }
    self().copies.erase(self().copies.begin(), landed);
}

}  // namespace fibers
