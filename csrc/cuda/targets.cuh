// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The target's column of G, outside the GEMMs, and the projection that finishes dx and dw.
//
// Never materialised: a second copy of dw, anything dense of the targets. Fast because: each row of
// dw is read twice while it is in cache and written once; targets cost O(N D), unrounded.

#pragma once

#include "projection.cuh"
#include "rows.cuh"

namespace marginkernels::cuda {

// Writes the weight of w_y in a row's dx, and the targets' part of each class's dw, a warp per row.
// The first row of each class adds up the parts of all rows of the class, in their order.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    target_kernel(const TargetCall call) {
    using A = statistics_t<T>;
    const int64_t row = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    const int64_t label = row < call.n ? call.y[row] : -1;
    const A* const x_inv = static_cast<const A*>(call.x_inv);
    const A* const grad_target = static_cast<const A*>(call.grad_target);
    const A* const grad_w_norm = static_cast<const A*>(call.grad_w_norm);
    A factor = *static_cast<const A*>(call.scale);
    if (call.normalize_w && label >= 0) factor *= static_cast<const A*>(call.w_inv)[label];
    if (lane == 0 && row < call.n)
        static_cast<A*>(call.coefficient)[row] =
            label >= 0 ? grad_target[row] * x_inv[row] * factor : A(0);
    bool first = label >= 0;
    for (int64_t k = lane; k < row; k += kWarp) first = first && call.y[k] != label;
    if (!__all_sync(~0U, first)) return;

    for (int start = 0; start < call.width; start += kWarp * 4) {
        const int column = start + lane * 4;
        Four<A> total = {};
        A radial_total = 0;
        for (int64_t group = row; group < call.n; group += kWarp) {
            const int64_t mine = group + lane;
            unsigned same = __ballot_sync(~0U, mine < call.n && call.y[mine] == label);
            for (int64_t k = group; same != 0; ++k, same >>= 1) {
                if (same % 2 == 0) continue;
                if (grad_w_norm) radial_total += grad_w_norm[k];
                if (column >= call.width) continue;
                const A g = grad_target[k] * x_inv[k] * factor;
                const auto x = load_four(static_cast<const T*>(call.x) + k * call.width + column);
#pragma unroll
                for (int e = 0; e < 4; ++e) total.v[e] += g * x.v[e];
            }
        }
        if (column < call.width)
            reinterpret_cast<Four<A>*>(static_cast<A*>(call.sums) + row * call.width + column)[0] =
                total;
        if (start == 0 && lane == 0) {
            call.slot[label] = static_cast<int>(row);
            if (grad_w_norm) static_cast<A*>(call.radial)[row] = radial_total;
        }
    }
}

// Turns the gradient along unit rows into the gradient of raw rows, in its final type: removes the
// part along the row, which normalisation undoes, and writes 0 for a zero row. Adds the target's
// share, and the gradient that arrives through the norm.
template <class T, class Out>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    project_kernel(const ProjectCall call) {
    using A = statistics_t<T>;
    const int64_t row = row_of_warp();
    const int lane = threadIdx.x % kWarp, width = call.raw.width;
    if (row >= call.count) return;
    const RowGradient<A> gradient(call.raw, row);
    const T* const values = static_cast<const T*>(call.rows) + row * width;
    A along = 0;
    for (int k = lane * 4; call.raw.normalize && k < width; k += kWarp * 4) {
        const auto g = gradient.at(k), v = load_four(values + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) along += g.v[e] * v.v[e];
    }
    const A radius = gradient.radius(along);
    Out* const out = static_cast<Out*>(call.out) + (call.index ? call.index[row] : row) * call.d;
    for (int k = lane * 4; k < width; k += kWarp * 4) {
        const auto g = gradient.at(k), v = load_four(values + k);
        Four<Out> rounded;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            ptx::round_to(rounded.v[e], gradient.tangent(g.v[e], v.v[e], radius));
        store_up_to_four(out, k, call.d, call.d == width, rounded);
    }
}

}  // namespace marginkernels::cuda
