// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The targets' columns of G, outside the GEMMs.
//
// Never materialised: anything dense of the targets. Fast because: a target costs O(D), unrounded,
// and pairs that share a class are found by a short scan or by a sort.

#pragma once

#include "rows.cuh"

namespace marginkernels::cuda {

// Calls f(pair) for the pairs of a class in their order, the first of which is at `place`. A warp
// calls it together.
template <class F>
__device__ __forceinline__ void for_each_pair_of_class(const TargetCall& call, int64_t place,
                                                       int64_t label, F&& f) {
    if (call.order) {
        for (int64_t p = place; p < call.pairs && call.sorted[p] == label; ++p) f(call.order[p]);
        return;
    }
    for (int64_t group = place; group < call.pairs; group += kWarp) {
        const int64_t mine = group + threadIdx.x % kWarp;
        unsigned same = __ballot_sync(~0U, mine < call.pairs && call.y[mine] == label);
        for (int64_t k = group; same != 0; ++k, same >>= 1)
            if (same % 2 != 0) f(k);
    }
}

// Returns whether no pair before has the same label.
__device__ __forceinline__ bool is_first_of_class(const TargetCall& call, int64_t place,
                                                  int64_t label) {
    if (call.order) return place == 0 || call.sorted[place - 1] != label;
    for (int64_t group = 0; group < place; group += kWarp) {
        const int64_t k = group + threadIdx.x % kWarp;
        if (!__all_sync(~0U, k >= place || call.y[k] != label)) return false;
    }
    return true;
}

// Writes a pair's part of dx, and the targets' part of each class's dw, a warp per pair. The first
// pair of each class adds up the parts of all pairs of the class, in their order.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    target_kernel(const TargetCall call) {
    using A = statistics_t<T>;
    const int64_t place = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    if (place >= call.pairs) return;
    const int64_t pair = call.order ? call.order[place] : place, label = call.y[pair];
    const A* const grad_w_norm = static_cast<const A*>(call.grad_w_norm);
    A factor = *static_cast<const A*>(call.scale);
    if (call.normalize_w && label >= 0) factor *= static_cast<const A*>(call.w_inv)[label];
    const auto row_of = [&](int64_t p) { return static_cast<int>(p) % call.n; };
    const auto gradient = [&](int64_t p, int row) {
        return static_cast<const A*>(call.grad_target)[p] * static_cast<const A*>(call.x_inv)[row] *
               factor;
    };
    const A own = label >= 0 ? gradient(pair, row_of(pair)) : A(0);
    for_each_four<0>(call.width, [&](int, int k) {
        Four<A> part = {};
        if (label >= 0) part = load_rounded<T>(call.w, label, k);
#pragma unroll
        for (int e = 0; e < 4; ++e) part.v[e] *= own;
        *reinterpret_cast<Four<A>*>(static_cast<A*>(call.dx) + pair * call.width + k) = part;
    });
    if (label < 0 || !is_first_of_class(call, place, label)) return;

    for (int start = 0; start < call.width; start += kWarp * 4) {
        const int column = start + lane * 4;
        Four<A> total = {};
        A radial_total = 0;
        for_each_pair_of_class(call, place, label, [&](int64_t p) {
            if (grad_w_norm) radial_total += grad_w_norm[p];
            if (column >= call.width) return;
            const int64_t row = row_of(p);
            const A g = gradient(p, row);
            const auto x = load_four(static_cast<const T*>(call.x) + row * call.width + column);
#pragma unroll
            for (int e = 0; e < 4; ++e) total.v[e] += g * x.v[e];
        });
        if (column < call.width)
            reinterpret_cast<Four<A>*>(static_cast<A*>(call.sums) + pair * call.width + column)[0] =
                total;
        if (start == 0 && lane == 0) {
            call.slot[label] = static_cast<int>(pair);
            if (grad_w_norm) static_cast<A*>(call.radial)[pair] = radial_total;
        }
    }
}

}  // namespace marginkernels::cuda
