// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Kernels that are linear in N, in C D or in N D: rounding with norms, factors of rows, the merge
// of statistics.
//
// Never materialised: normalised rows, one-hot labels. Fast because: a warp reads a row once, its
// lanes next to each other. Sums have a fixed order and no atomics.

#pragma once

#include <type_traits>

#include "warp.cuh"

namespace marginkernels::cuda {

// Writes 1 / |row| of rows that need no rounding, at most `inverse_limit`. Padding gets that too. A
// kernel of its own has so few instructions that memory bounds it.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    norm_kernel(const T* rows,             // (count, width)
                statistics_t<T>* inverse,  // (padded,)
                int64_t count, int64_t padded, int width, statistics_t<T> inverse_limit) {
    using A = statistics_t<T>;
    const int64_t row = row_of_warp();
    A squares = 0;
    if (row < count)
        for (int k = threadIdx.x % kWarp * 4; k < width; k += kWarp * 4) {
            const auto four = load_four(rows + row * width + k);
#pragma unroll
            for (const A v : four.v) squares += v * v;
        }
    squares = sum_over_warp(squares);
    if (threadIdx.x % kWarp == 0 && row < padded)
        inverse[row] = inverse_norm(squares, inverse_limit);
}

// Rounds rows to the compute type, and takes 1 / |row| of what it has rounded, as above. All loads
// of a lane start before its first store.
template <class From, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm) round_kernel(const RoundCall call) {
    using A = statistics_t<T>;
    constexpr int kAtOnce = 4, kStep = kWarp * 4;
    const int64_t row = row_of_warp();
    const int first = threadIdx.x % kWarp * 4;
    const From* const from = row < call.count ? stored_row<From>(call.from, row) : nullptr;
    T* const to = row < call.out_rows ? static_cast<T*>(call.out) + row * call.width : nullptr;
    A squares = 0;
    for (int start = first; start < call.width; start += kAtOnce * kStep) {
        Four<From> loaded[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (from)
                loaded[i] = raw_up_to_four(from, start + i * kStep, call.from.d, call.from.vectors);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            Four<T> rounded;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (std::is_same_v<From, T>) {
                    rounded.v[e] = loaded[i].v[e];
                } else {
                    ptx::round_to(rounded.v[e], ptx::to_float(loaded[i].v[e]));
                }
                const A value = ptx::to_float(rounded.v[e]);
                squares += value * value;
            }
            const int k = start + i * kStep;
            if (to && k < call.width) *reinterpret_cast<Four<T>*>(to + k) = rounded;
        }
    }
    if (call.inverse == nullptr) return;
    squares = sum_over_warp(squares);
    if (threadIdx.x % kWarp == 0 && row < call.inverse_rows)
        static_cast<A*>(call.inverse)[row] = inverse_norm(squares, A(call.inverse_limit));
}

// Marks the class tiles that hold a target of the block's row tile: only those pay for a mask, and
// only for the targets that are there.
__device__ __forceinline__ void flag_targets(const TargetTiles& targets) {
    uint8_t* const flags = targets.flags + static_cast<int64_t>(blockIdx.x) * targets.stride;
    for (int k = threadIdx.x * 16; k < targets.stride; k += kRowThreads * 16)
        *reinterpret_cast<Four<uint32_t>*>(flags + k) = {};
    for (int bit = 0; bit < kFlagBits && bit < targets.targets; ++bit) {
        __syncthreads();  // between barriers, all that share a flag store the same value
        for (int i = threadIdx.x; i < targets.tile_rows; i += kRowThreads) {
            const int row = static_cast<int>(blockIdx.x) * targets.tile_rows + i;
            for (int l = bit; row < targets.n && l < targets.targets; l += kFlagBits) {
                const int64_t label = targets.y[l * int64_t{targets.n} + row];
                if (label >= 0) flags[label / kTileClasses] |= 1 << bit;
            }
        }
    }
}

// Prepares a row tile, a block each: its flags, and the factor that the statistics' epilogue
// multiplies a row's dot products with. It is scale / |x_i| in units of ln 2, or plain before a
// bias, or without the scale before a transform. It is positive in padding rows too, since an
// excluded logit is -inf times this factor.
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    statistics_rows_kernel(const StatisticsRowsCall call) {
    flag_targets(call.targets);
    for (int i = threadIdx.x; i < call.targets.tile_rows; i += kRowThreads) {
        const int row = static_cast<int>(blockIdx.x) * call.targets.tile_rows + i;
        const float r = row < call.targets.n ? call.x_inv[row] : 1.0F;
        call.rate[row] = (call.with_scale ? r * *call.scale : r) * call.per_unit;
    }
}

// Writes the planes of numbers per row that the gradient's epilogue reads. In the plain case rate
// takes in the scale, shift is in units of ln 2, and a and u take in fold: the epilogue then needs
// no more than the dot product and the class's factor. The general case has each of them as it is,
// because the transform, the bias and the sums need them apart.
__device__ __forceinline__ void write_planes(const GradientRowsCall& call, int row) {
    const bool there = row < call.targets.n;
    const float inverse = there ? call.x_inv[row] : 1.0F;
    const float scale = *call.scale;
    // zero rows would claim all of fp16's range, for a gradient that is 0
    float fold = inverse < call.inverse_limit ? inverse * scale : 1.0F;
    if (call.g_scale) fold *= *call.g_scale;
    float a = there ? call.grad_lse[row] : 0.0F;
    // a row without negatives has lse = -inf, and no G
    float shift = there && call.lse[row] != -INFINITY ? call.lse[row] : 0.0F;
    float rate = inverse, u = there && call.grad_sum ? call.grad_sum[row] : 0.0F;
    if (!call.general) {
        // rounding takes several digits from the shift at a scale of 256: they go into a
        const float rounded = shift * kLog2E;
        a *= fold * ptx::exp2(-fmaf(shift, kLog2E, -rounded));
        u *= fold;
        shift = rounded;
        rate *= scale * kLog2E;
    }
    float* const plane = call.planes + row;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * call.targets.tile_rows;
    plane[kRate * stride] = rate;
    plane[kShift * stride] = shift;
    plane[kA * stride] = a;
    plane[kU * stride] = u;
    plane[kFold * stride] = fold;
}

// Prepares a row tile, a block each: its flags and its planes.
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    gradient_rows_kernel(const GradientRowsCall call) {
    flag_targets(call.targets);
    for (int i = threadIdx.x; i < call.targets.tile_rows; i += kRowThreads)
        write_planes(call, static_cast<int>(blockIdx.x) * call.targets.tile_rows + i);
}

// Returns m unit + log(l) of a normal l > 0, rounded once where it is large: an error of lse is a
// relative error of every probability, and log(l) alone may be 50.
__device__ __forceinline__ float log_sum(float m, float unit, float l) {
    const uint32_t bits = mk::bit_cast<uint32_t>(l);
    const float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 127);
    const float mantissa = mk::bit_cast<float>((bits & 0x7fffff) | 0x3f800000);
    // ln 2 in two parts: the product with the first one is exact
    const float small = ptx::fma(exponent, -2.12194440e-4F, logf(mantissa));
    return ptx::fma(exponent, 0.693359375F, ptx::fma(m, unit, small));
}

__device__ __forceinline__ double log_sum(double m, double unit, double l) {
    return m * unit + log(l);
}

// Writes the cosine of a row and its l-th target, and the target's norm.
template <class T>
__device__ __forceinline__ void finish_target(const FinishRowsCall& call, int64_t row, int l) {
    using A = statistics_t<T>;
    const int64_t label = call.y[l * int64_t{call.n} + row], result = row * call.targets + l;
    const int lane = threadIdx.x % kWarp;
    A dot = 0;
    if (label >= 0) {
        const T* const x = static_cast<const T*>(call.x) + row * call.width;
        for (int k = lane * 4; k < call.width; k += kWarp * 4) {
            const auto a = load_four(x + k), b = load_rounded<T>(call.w, label, k);
#pragma unroll
            for (int e = 0; e < 4; ++e) dot += a.v[e] * b.v[e];
        }
    }
    dot = sum_over_warp(dot);
    if (lane != 0) return;
    const A q = label >= 0 ? static_cast<const A*>(call.w_inv)[label] : A(1);
    const A inverse = static_cast<const A*>(call.x_inv)[row];
    static_cast<A*>(call.target_cosine)[result] = dot * inverse * (call.normalize_w ? q : A(1));
    static_cast<A*>(call.w_norm)[result] = label >= 0 ? 1 / q : A(0);
}

// Merges the partial statistics of a row, and takes <x_i, w_y> of its targets.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    finish_rows_kernel(const FinishRowsCall call) {
    using A = statistics_t<T>;
    const int64_t row = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    const bool there = row < call.n;
    const A to_log2 = call.log2_units ? A(1) : A(1 / kLn2), unit = call.log2_units ? A(kLn2) : A(1);
    const int64_t plane = static_cast<int64_t>(call.partials_per_row) * call.n;
    A m = kNoMaximum, l = 0, total = 0, top = kNoMaximum;
    const auto merge = [&](A other_m, A other_l, A other_top) {
        const A higher = m > other_m ? m : other_m;
        l = l * ptx::exp2((m - higher) * to_log2);
        l += other_l * ptx::exp2((other_m - higher) * to_log2);
        m = higher;
        top = top > other_top ? top : other_top;
    };
    for (int p = lane; there && p < call.partials_per_row; p += kWarp) {
        const A* const partial = static_cast<const A*>(call.partials) + int64_t{p} * call.n + row;
        merge(partial[kMaximum * plane], partial[kExponentials * plane],
              partial[call.maximum_plane * plane]);
        if (call.logit_sum) total += partial[kLogitSum * plane];
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const auto other = [&](A value) { return __shfl_xor_sync(~0U, value, lanes); };
        const A other_m = other(m), other_l = other(l);
        merge(other_m, other_l, other(top));
    }
    total = sum_over_warp(total);

    if (!there) return;
    for (int target = 0; target < call.targets; ++target) finish_target<T>(call, row, target);
    if (lane != 0) return;
    // no negatives; one versus rest their sum may vanish, and all partials have the same m, so that
    // merging just adds
    const bool none = call.one_versus_rest ? top == A(kNoMaximum) : l == 0;
    const auto set = [&](void* to, A value) { static_cast<A*>(to)[row] = value; };
    set(call.lse, call.one_versus_rest ? l : none ? -INFINITY : log_sum(m, unit, l));
    if (call.logit_sum) set(call.logit_sum, total * unit);
    if (call.logit_max) set(call.logit_max, none ? -INFINITY : top * unit);
}

}  // namespace marginkernels::cuda
