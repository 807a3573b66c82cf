// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The target's column of G, outside the GEMMs.
//
// Never materialised: anything dense of the targets. Fast because: targets cost O(N D), unrounded,
// and rows that share a class are found by a short scan or by a sort.

#pragma once

#include "rows.cuh"

namespace marginkernels::cuda {

// Calls f(row) for the rows of a class in their order, the first of which is at `place`. A warp
// calls it together.
template <class F>
__device__ __forceinline__ void for_each_row_of_class(const TargetCall& call, int64_t place,
                                                      int64_t label, F&& f) {
    if (call.order) {
        for (int64_t p = place; p < call.n && call.sorted[p] == label; ++p) f(call.order[p]);
        return;
    }
    for (int64_t group = place; group < call.n; group += kWarp) {
        const int64_t mine = group + threadIdx.x % kWarp;
        unsigned same = __ballot_sync(~0U, mine < call.n && call.y[mine] == label);
        for (int64_t k = group; same != 0; ++k, same >>= 1)
            if (same % 2 != 0) f(k);
    }
}

// Returns whether no row before has the same label.
__device__ __forceinline__ bool is_first_of_class(const TargetCall& call, int64_t place,
                                                  int64_t label) {
    if (call.order) return place == 0 || call.sorted[place - 1] != label;
    for (int64_t group = 0; group < place; group += kWarp) {
        const int64_t k = group + threadIdx.x % kWarp;
        if (!__all_sync(~0U, k >= place || call.y[k] != label)) return false;
    }
    return true;
}

// Writes w_y and its weight in a row's dx, and the targets' part of each class's dw, a warp per
// row. The first row of each class adds up the parts of all rows of the class, in their order.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    target_kernel(const TargetCall call) {
    using A = statistics_t<T>;
    const int64_t place = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    if (place >= call.n) return;
    const int64_t row = call.order ? call.order[place] : place, label = call.y[row];
    const A* const x_inv = static_cast<const A*>(call.x_inv);
    const A* const grad_target = static_cast<const A*>(call.grad_target);
    const A* const grad_w_norm = static_cast<const A*>(call.grad_w_norm);
    A factor = *static_cast<const A*>(call.scale);
    if (call.normalize_w && label >= 0) factor *= static_cast<const A*>(call.w_inv)[label];
    if (lane == 0)
        static_cast<A*>(call.coefficient)[row] =
            label >= 0 ? grad_target[row] * x_inv[row] * factor : A(0);
    for_each_four<0>(call.width, [&](int, int k) {
        A* const to = static_cast<A*>(call.label_rows) + row * call.width + k;
        Four<A> four = {};
        if (label >= 0) four = load_rounded<T>(call.w, label, k);
        *reinterpret_cast<Four<A>*>(to) = four;
    });
    if (label < 0 || !is_first_of_class(call, place, label)) return;

    for (int start = 0; start < call.width; start += kWarp * 4) {
        const int column = start + lane * 4;
        Four<A> total = {};
        A radial_total = 0;
        for_each_row_of_class(call, place, label, [&](int64_t k) {
            if (grad_w_norm) radial_total += grad_w_norm[k];
            if (column >= call.width) return;
            const A g = grad_target[k] * x_inv[k] * factor;
            const auto x = load_four(static_cast<const T*>(call.x) + k * call.width + column);
#pragma unroll
            for (int e = 0; e < 4; ++e) total.v[e] += g * x.v[e];
        });
        if (column < call.width)
            reinterpret_cast<Four<A>*>(static_cast<A*>(call.sums) + row * call.width + column)[0] =
                total;
        if (start == 0 && lane == 0) {
            call.slot[label] = static_cast<int>(row);
            if (grad_w_norm) static_cast<A*>(call.radial)[row] = radial_total;
        }
    }
}

}  // namespace marginkernels::cuda
