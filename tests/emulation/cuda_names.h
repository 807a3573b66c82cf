// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// CUDA's own functions, as far as kernels use them; included by fibers.h.

#pragma once

#include "fiber_sync.h"

inline void __syncthreads(int line = __builtin_LINE()) {
    fibers::barrier("__syncthreads", line);
}
inline void fibers_whole(uint32_t mask) {
    if (mask != ~0U) fibers::fail("a mask of less than all lanes is not modelled");
}
inline void __syncwarp(uint32_t mask = ~0U, int line = __builtin_LINE()) {
    fibers_whole(mask);
    fibers::warp("__syncwarp", mask, [](auto&) {}, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int vote, int line = __builtin_LINE()) {
    fibers_whole(mask);
    uint32_t mine = vote != 0;
    const auto count = [](uint32_t*(&lanes)[32]) {
        uint32_t all = 0;
        for (int i = 0; i < 32; ++i) all |= *lanes[i] << i;
        for (uint32_t* lane : lanes) *lane = all;
    };
    fibers::warp("vote", mine, count, line);
    return mine;
}
inline int __all_sync(uint32_t mask, int vote, int line = __builtin_LINE()) {
    return __ballot_sync(mask, vote, line) == mask;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int by, int line = __builtin_LINE()) {
    fibers_whole(mask);
    struct Shuffle {
        T given, taken;
    } mine = {value, value};
    const auto exchange = [by](Shuffle*(&lanes)[32]) {
        for (int i = 0; i < 32; ++i) lanes[i]->taken = lanes[i ^ by]->given;
    };
    fibers::warp("shuffle", mine, exchange, line);
    return mine.taken;
}
