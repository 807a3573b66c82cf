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

// Returns 1 / norm of a row from its sum of squares, at most `limit`: exactly that value marks a
// zero row.
template <class A>
__device__ __forceinline__ A inverse_norm(A squares, A limit) {
    const A norm = sqrt(squares);
    return 1 / norm < limit ? 1 / norm : limit;
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

// Loads numbers k to k + 3 of a row that has d, with zeros from d on.
template <class T>
__device__ __forceinline__ Four<statistics_t<T>> load_up_to_four(const T* row, int k, int d,
                                                                 bool vectors) {
    Four<statistics_t<T>> to = {};
    if (vectors) {
        if (k < d) to = load_four(row + k);
    } else {
        for (int e = 0; e < 4 && k + e < d; ++e) to.v[e] = ptx::to_float(row[k + e]);
    }
    return to;
}

// Stores numbers k to k + 3 of a row that has d.
template <class T>
__device__ __forceinline__ void store_up_to_four(T* row, int k, int d, bool vectors,
                                                 const Four<T>& values) {
    if (vectors) {
        if (k < d) *reinterpret_cast<Four<T>*>(row + k) = values;
    } else {
        for (int e = 0; e < 4 && k + e < d; ++e) row[k + e] = values.v[e];
    }
}

}  // namespace marginkernels::cuda
