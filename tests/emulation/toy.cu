// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// A small pipeline of asynchronous copies, correct, and with one bug of each kind that has to be
// found: by the fibers, by the PTX simulator, or by the gate that reads the machine code.

#include "cuda/ptx.h"

namespace ptx = marginkernels::cuda::ptx;

enum Bug {
    kNone,
    kMissingBarrier,
    kMissingWait,
    kMissingMask,
    kDivergentBarrier,
    kMissingLane,
    kUnfinishedCopies,
    kOverrun,
    kBankConflicts,
    kSpills,
    kBugs,
};

constexpr int kThreads = 128, kStages = 3;

// Rows of four words, summed over tiles of 128: lane l of warp w adds up word l % 4 of the rows
// 127 - (32 w + 8 m + l / 4) of each tile, for m = 0 to 3.
template <int kBug>
__global__ void __launch_bounds__(kThreads, kBug == kSpills ? 16 : 1)
    toy(const uint32_t* in, uint32_t* out, int rows) {  // in (rows, 4), out (128, 4)
    constexpr int kPitch = kBug == kBankConflicts ? 128 : 16, kStageBytes = kThreads * kPitch;
    const uint32_t memory = ptx::shared_memory() + (kBug == kOverrun ? kStageBytes : 0);
    const int lane = threadIdx.x % 32, tiles = (rows + kThreads - 1) / kThreads;
    const auto issue = [&](int tile) {
        const int row = tile * kThreads + threadIdx.x;
        const bool there = kBug == kMissingMask ? tile < tiles : row < rows;
        const uint32_t to = memory + tile % kStages * kStageBytes + threadIdx.x * kPitch;
        ptx::copy_async(to, in + (there ? 4 * row : 0), there);
        ptx::commit_async();
    };
    constexpr int kSums = kBug == kSpills ? 64 : 4;
    uint32_t sums[kSums] = {};
    for (int tile = 0; tile < kStages - 1; ++tile) issue(tile);
    for (int tile = 0; tile < tiles; ++tile) {
        if (kBug != kMissingWait) ptx::wait_async<kStages - 2>();
        if (kBug != kMissingBarrier && (kBug != kDivergentBarrier || threadIdx.x < 64)) {
            __syncthreads();
        }
        issue(tile + kStages - 1);
        const uint32_t stage = memory + tile % kStages * kStageBytes;
        for (int part = 0; part < kSums; part += 4) {
            uint32_t words[4];
            ptx::load_matrices(words, stage + ((kThreads - 1 - threadIdx.x) ^ part) * kPitch);
            for (int m = 0; m < 4; ++m) sums[part + m] = sums[part + m] * 3 + words[m];
        }
    }
    if (kBug != kUnfinishedCopies) ptx::wait_async<0>();
    if (kBug != kMissingLane || lane != 5) sums[3] += __shfl_xor_sync(~0U, sums[2], 1);
    for (int i = 0; i < kSums; ++i) out[(i / 4 * kThreads + threadIdx.x) * 4 + i % 4] = sums[i];
}

#if defined(MK_ON_HOST)

template <int kBug>
void launch(int bug, const uint32_t* in, uint32_t* out, int rows, int shared_bytes) {
    if (bug == kBug) fibers::launch("toy", toy<kBug>, 1, kThreads, shared_bytes, in, out, rows);
    if constexpr (kBug + 1 < kBugs) launch<kBug + 1>(bug, in, out, rows, shared_bytes);
}

// Returns the reported error, or an empty string.
extern "C" const char* run_toy(int bug, const uint32_t* in, uint32_t* out, int rows, int shared) {
    static std::string error;
    error.clear();
    try {
        launch<kNone>(bug, in, out, rows, shared);
    } catch (const std::exception& report) {
        error = report.what();
    }
    return error.c_str();
}

#else

template __global__ void toy<kNone>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kMissingBarrier>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kMissingWait>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kMissingMask>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kDivergentBarrier>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kMissingLane>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kOverrun>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kBankConflicts>(const uint32_t*, uint32_t*, int);
template __global__ void toy<kSpills>(const uint32_t*, uint32_t*, int);

#endif
