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

// Whether a class has a target among the pairs. `slot` is the class's, and any number where not.
__device__ __forceinline__ bool is_target(int64_t slot, const int64_t* y, int pairs,
                                          int64_t class_) {
    return slot >= 0 && slot < pairs && y[slot] == class_;
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
__device__ __forceinline__ Four<T> raw_up_to_four(const T* row, int k, int d, bool vectors) {
    Four<T> to = {};
    if (vectors) {
        if (k < d) to = *reinterpret_cast<const Four<T>*>(row + k);
    } else {
        for (int e = 0; e < 4 && k + e < d; ++e) to.v[e] = row[k + e];
    }
    return to;
}

// Loads them in the type of statistics.
template <class T>
__device__ __forceinline__ Four<statistics_t<T>> load_up_to_four(const T* row, int k, int d,
                                                                 bool vectors) {
    const auto raw = raw_up_to_four(row, k, d, vectors);
    Four<statistics_t<T>> to;
#pragma unroll
    for (int e = 0; e < 4; ++e) to.v[e] = ptx::to_float(raw.v[e]);
    return to;
}

template <class T>
__device__ __forceinline__ const T* stored_row(const StoredRows& rows, int64_t row) {
    return static_cast<const T*>(rows.data) + (rows.index ? rows.index[row] : row) * rows.stride;
}

// Loads numbers k to k + 3 of a stored row of any type, rounded to T.
template <class T>
__device__ __forceinline__ Four<statistics_t<T>> load_rounded(const StoredRows& rows, int64_t row,
                                                              int k) {
    Four<statistics_t<T>> to = {};
    const auto load = [&](auto stored) {
        const auto from = stored_row<decltype(stored)>(rows, row);
        const auto four = load_up_to_four(from, k, rows.d, rows.vectors);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            T rounded;
            ptx::round_to(rounded, four.v[e]);
            to.v[e] = ptx::to_float(rounded);
        }
    };
    switch (rows.type) {
        case Type::kFloat32: load(float()); break;
        case Type::kFloat64: load(double()); break;
        case Type::kBFloat16: load(bf16()); break;
        case Type::kFloat16: load(fp16()); break;
    }
    return to;
}

// Calls f(i, k) for each four numbers k to k + 3 of a row that are the lane's, its i-th ones. With
// kFours = 0 rows are of any width, and i is 0.
template <int kFours, class F>
__device__ __forceinline__ void for_each_four(int width, F&& f) {
    const int first = threadIdx.x % kWarp * 4;
    if constexpr (kFours == 0) {
        for (int k = first; k < width; k += kWarp * 4) f(0, k);
    } else {
#pragma unroll
        for (int i = 0; i < kFours; ++i)
            if (first + i * kWarp * 4 < width) f(i, first + i * kWarp * 4);
    }
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
