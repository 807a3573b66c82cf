// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Kernels on the N numbers around the sweeps: the labels before, the loss after.

#pragma once

#include "../loss.h"
#include "warp.cuh"

namespace marginkernels::cuda {

constexpr int kLossThreads = 512;  // of the one block

// Returns the sum over the block, the same in all threads; every order is fixed.
template <class A>
__device__ __forceinline__ A sum_over_block(A value, A* per_warp) {
    value = sum_over_warp(value);
    __syncthreads();  // the sums of a call before have been read
    if (threadIdx.x % kWarp == 0) per_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    A total = 0;
    for (int warp = 0; warp < kLossThreads / kWarp; ++warp) total += per_warp[warp];
    return total;
}

// Computes the loss and its derivatives. One block walks over all rows, since the mean needs the
// sum of the weights first.
template <class A>
__global__ void __launch_bounds__(kLossThreads) loss_kernel(const mk::LossCall<A> call) {
    A* const per_warp = ptx::shared_array<A>();  // (warps,)
    A share = 1;
    if (call.mean) {
        A weights = 0;
        for (int64_t i = threadIdx.x; i < call.n; i += kLossThreads) weights += call.weight(i);
        const A total = sum_over_block(weights, per_warp);
        if (total > 0) share = 1 / total;
    }
    A sum = 0;
    for (int64_t i = threadIdx.x; i < call.n; i += kLossThreads) sum += call.take(i, share);
    if (call.each) return;
    sum = sum_over_block(sum, per_warp);
    if (threadIdx.x == 0) *call.loss = sum * share;
}

// Writes the place of each label among the classes that w holds, or -1.
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    held_kernel(const int64_t* labels,  // (N,)
                int64_t* held,          // (N,)
                int64_t n, int64_t first, int64_t count, int64_t ignore_index) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i < n) held[i] = mk::held_class(labels[i], first, count, ignore_index);
}

}  // namespace marginkernels::cuda
