// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Helpers of kernels with a warp per row: the row, four of its numbers at a time, sums in one
// order.

#pragma once

#include "kernels.h"
#include "ptx.h"

namespace marginkernels::cuda {

constexpr int kRowThreads = 4 * kWarp;  // of a block, a warp per row
constexpr int kRowsPerBlock = kRowThreads / kWarp;

template <class A>
__device__ __forceinline__ A sum_over_warp(A value) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0U, value, lanes);
    return value;
}

__device__ __forceinline__ int64_t row_of_warp() {
    return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
}

// Loads four neighbours in the type of statistics.
template <class T>
__device__ __forceinline__ Four<statistics_t<T>> load_four(const T* from) {
    const auto raw = *reinterpret_cast<const Four<T>*>(from);
    Four<statistics_t<T>> to;
#pragma unroll
    for (int k = 0; k < 4; ++k) to.v[k] = ptx::to_float(raw.v[k]);
    return to;
}

}  // namespace marginkernels::cuda
