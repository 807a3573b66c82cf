// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The projection that finishes dx and dw.
//
// Never materialised: a second copy of dw. Fast because: a row and its gradient stay in registers,
// so that each is read once and the result written once.

#pragma once

#include "projection.cuh"

namespace marginkernels::cuda {

// Turns the gradient along unit rows into the gradient of raw rows, in its final type: removes the
// part along the row, which normalisation undoes, and writes 0 for a zero row. Adds the target's
// share, and the gradient that arrives through the norm. With kFours = 0 rows are of any width, and
// are read twice.
template <class T, class Out, int kFours>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    project_kernel(const ProjectCall call) {
    using A = statistics_t<T>;
    const int64_t row = row_of_warp();
    const int width = call.raw.width;
    if (row >= call.count) return;
    const RowGradient<A> gradient(call.raw, row);
    const T* const values = static_cast<const T*>(call.rows) + row * width;
    Four<A> held[kFours ? kFours : 1], held_values[kFours ? kFours : 1];
    A along = 0;
    for_each_four<kFours>(width, [&](int i, int k) {
        held[i] = gradient.at(k), held_values[i] = load_four(values + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) along += held[i].v[e] * held_values[i].v[e];
    });
    const A radius = gradient.radius(call.raw.normalize ? along : A(0));
    Out* const out = static_cast<Out*>(call.out) + (call.index ? call.index[row] : row) * call.d;
    for_each_four<kFours>(width, [&](int i, int k) {
        if (kFours == 0) held[i] = gradient.at(k), held_values[i] = load_four(values + k);
        Four<Out> rounded;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            ptx::round_to(rounded.v[e],
                          gradient.tangent(held[i].v[e], held_values[i].v[e], radius));
        store_up_to_four(out, k, call.d, call.vectors, rounded);
    });
}

}  // namespace marginkernels::cuda
