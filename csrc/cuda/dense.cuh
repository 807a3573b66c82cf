// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// fp32 and fp64: turns the dot products that the vendor's GEMM left in a workspace into statistics
// or into G, a chunk of classes at a time.
//
// What: softmax statistics per row, and G in the place of the products. Never materialised: more of
// the logits than the chunk, which stays in L2. Fast because: a class's rows lie next to each
// other; for statistics a thread has a row and waits for nobody, for G a warp has a class and one
// sum at the end.

#pragma once

#include "warp.cuh"

namespace marginkernels::cuda {

constexpr int kDenseBatch = 8;  // classes that a thread loads at once

// The logit of a row and a class before and after the transform, and the transform's slope.
template <class A, class F>
struct DenseLogit {
    A value, slope, f, z;  // f = scale value + bias, z = scale c + bias

    __device__ __forceinline__ DenseLogit(A c, A scale, A bias, A parameter, const A* constants) {
        const auto transformed = F::apply(c, parameter, constants);
        value = transformed.value;
        slope = transformed.slope;
        f = ptx::fma(scale, value, bias);  // the same bits in both sweeps
        z = ptx::fma(scale, c, bias);
    }
};

template <class A>
__device__ __forceinline__ A at_or(const void* from, int64_t index, A otherwise) {
    return from ? static_cast<const A*>(from)[index] : otherwise;
}

template <class A>
__device__ __forceinline__ A exp_of(A x) {
    return ptx::exp2(x * A(1 / kLn2));
}

// The cosine of a row and a class, and the row among those of the chunk that has it: of the class's
// centres the one with the greatest, the first of equals.
template <class A, bool kSubCenters>
struct DenseClass {
    int64_t center;
    A cosine;

    // `products` are those of x's row.
    __device__ __forceinline__ DenseClass(const DenseCall& chunk, const A* products, int64_t class_,
                                          A inverse) {
        const int centers = kSubCenters ? chunk.sub_centers : 1;
        center = class_ * centers;
        cosine = cosine_of(chunk, products, center, inverse);
        if constexpr (kSubCenters)
            for (int64_t other = center + 1; other < (class_ + 1) * centers; ++other) {
                const A of_other = cosine_of(chunk, products, other, inverse);
                if (!(of_other > cosine)) continue;
                center = other;
                cosine = of_other;
            }
    }

    static __device__ __forceinline__ A cosine_of(const DenseCall& chunk, const A* products,
                                                  int64_t center, A inverse) {
        return products[center * chunk.stride] * inverse * at_or(chunk.q, center, A(1));
    }
};

// Returns log(1 + exp(z)) and its derivative.
template <class A>
__device__ __forceinline__ mk::Softplus<A> softplus_of(A z) {
    return mk::softplus(z, exp_of(z < 0 ? z : -z));
}

// Returns the bit that stands for a class of a batch, or 0 for a class that is not in it.
__device__ __forceinline__ unsigned bit_of_batch(int class_) {
    return class_ >= 0 && class_ < kDenseBatch ? 1U << class_ : 0U;
}

// Takes softmax statistics of every `slices`-th batch of classes of the chunk, a thread per row.
template <class A, class F, bool kSubCenters>
__global__ void __launch_bounds__(kDenseRows, kRowBlocksPerSm)
    dense_statistics_kernel(const DenseStatisticsCall call) {
    const DenseCall& chunk = call.chunk;
    const int64_t row =
        static_cast<int64_t>(blockIdx.x % call.row_blocks) * kDenseRows + threadIdx.x;
    const int slice = blockIdx.x / call.row_blocks;
    if (row >= chunk.n) return;
    const int64_t plane = static_cast<int64_t>(call.slices) * chunk.n;
    A* const partial = static_cast<A*>(call.partials) + int64_t{slice} * chunk.n + row;
    const A scale = *static_cast<const A*>(chunk.scale);
    const A inverse = static_cast<const A*>(chunk.x_inv)[row];
    const A parameter = at_or(chunk.row_parameter, row, A(0));
    const auto* const constants = static_cast<const A*>(chunk.constants);
    const auto target = [&](int l) {
        return static_cast<int>(chunk.y[l * int64_t{chunk.n} + row] - chunk.first_class);
    };
    const int first_target = target(0);
    // both sides are normalised and s < mk::kOffsetScaleLimit: exp(z - offset) neither overflows
    // nor vanishes
    const A start = mk::kOffsetStart;
    const A offset = scale > start ? scale - start : A(0);
    A m = call.save_tiles ? offset : A(kNoMaximum), l = 0, total = 0, top = kNoMaximum;
    if (call.carry) {
        m = partial[kMaximum * plane];
        l = partial[kExponentials * plane];
        total = partial[kLogitSum * plane];
        top = partial[kLogitMaximum * plane];
    }
    A* const products = static_cast<A*>(chunk.products) + row;
    for (int first = slice * kDenseBatch; first < chunk.classes;
         first += call.slices * kDenseBatch) {
        A f[kDenseBatch], highest = m;
        unsigned excluded = bit_of_batch(first_target - first);
        for (int l = 1; l < chunk.targets; ++l) excluded |= bit_of_batch(target(l) - first);
#pragma unroll
        for (int k = 0; k < kDenseBatch; ++k) {
            f[k] = -INFINITY;
            const int class_ = first + k;
            if (class_ >= chunk.classes || (excluded >> k & 1) != 0) continue;
            const DenseClass<A, kSubCenters> found(chunk, products, class_, inverse);
            const DenseLogit<A, F> logit(found.cosine, scale, at_or(chunk.bias, found.center, A(0)),
                                         parameter, constants);
            f[k] = logit.f;
            top = top > logit.z ? top : logit.z;
            if constexpr (F::kOneVersusRest) {
                const auto term = softplus_of(logit.f);
                l += term.value;
                total += term.slope;
            } else {
                highest = highest > f[k] ? highest : f[k];
                total += logit.f;
            }
        }
        if constexpr (!F::kOneVersusRest) {  // there m stays as it is, and merging just adds
            if (call.save_tiles) highest = offset;
            l *= exp_of(m - highest);
            m = highest;
#pragma unroll
            for (int k = 0; k < kDenseBatch; ++k) {
                const A p = exp_of(f[k] - m);
                l += p;
                if (!call.save_tiles || first + k >= chunk.classes) continue;
                const A q = at_or(chunk.q, first + k, A(1));
                products[(first + k) * chunk.stride] = p * (q < A(chunk.inverse_limit) ? q : A(1));
            }
        }
    }
    partial[kMaximum * plane] = m;
    partial[kExponentials * plane] = l;
    partial[kLogitSum * plane] = total;
    partial[kLogitMaximum * plane] = top;
}

// Returns a derivative of the loss by a logit that takes part.
template <class A, class F>
__device__ __forceinline__ A dense_g(const DenseGradientCall& call, const DenseLogit<A, F>& logit,
                                     int64_t row) {
    A p;
    if constexpr (F::kOneVersusRest) {
        p = softplus_of(logit.f).slope;
    } else {
        A lse = static_cast<const A*>(call.lse)[row];
        // no negatives, or only such as a bias masks: the exponential is 0, or a target's
        if (lse == -INFINITY) lse = 0;
        p = exp_of(logit.f - lse);
    }
    return static_cast<const A*>(call.grad_lse)[row] * p + at_or(call.grad_sum, row, A(0));
}

// Returns 1 / |x_i| times the scale as G has it: 1 for a zero row.
template <class A>
__device__ __forceinline__ A dense_row_fold(const DenseCall& chunk, A inverse, A scale) {
    return inverse < A(chunk.inverse_limit) ? inverse * scale : A(1);
}

// Writes G in the place of the products, a warp per class.
template <class A, class F>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    dense_gradient_kernel(const DenseGradientCall call) {
    const DenseCall& chunk = call.chunk;
    const int64_t class_ = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    if (class_ >= chunk.classes) return;
    const A scale = *static_cast<const A*>(chunk.scale), limit = chunk.inverse_limit;
    const A q = at_or(chunk.q, class_, A(1)), bias = at_or(chunk.bias, class_, A(0));
    const A class_fold = q < limit ? q : A(1);
    const auto* const constants = static_cast<const A*>(chunk.constants);
    A* const products = static_cast<A*>(chunk.products) + class_ * chunk.stride;
    const int64_t label = chunk.first_class + class_;
    const int pairs = chunk.targets * chunk.n;
    const bool has_target = is_target(call.slot[class_], chunk.y, pairs, label);
    A dbias = 0, dscale = 0;
    for (int64_t row = lane; row < chunk.n; row += kWarp) {
        const A inverse = static_cast<const A*>(chunk.x_inv)[row];
        const DenseLogit<A, F> logit(products[row] * inverse * q, scale, bias,
                                     at_or(chunk.row_parameter, row, A(0)), constants);
        A g = dense_g(call, logit, row);
        for (int64_t pair = row; has_target && pair < pairs; pair += chunk.n)
            g = chunk.y[pair] == label ? A(0) : g;
        dbias += g;
        dscale += g * logit.value;
        products[row] = g * logit.slope * class_fold * dense_row_fold(chunk, inverse, scale);
    }
    dbias = sum_over_warp(dbias);
    dscale = sum_over_warp(dscale);
    if (lane == 0 && call.dbias) static_cast<A*>(call.dbias)[class_] = dbias;
    if (lane == 0 && call.dscale) static_cast<A*>(call.dscale)[class_] = dscale;
}

// Writes G of all centres of a class, a warp per class. A bias comes without a transform: its
// gradient is the sum of what a centre has in its first pass.
template <class A, class F>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    dense_centers_gradient_kernel(const DenseGradientCall call) {
    const DenseCall& chunk = call.chunk;
    const int64_t class_ = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    if (class_ >= chunk.classes) return;
    const int64_t first = class_ * chunk.sub_centers, stop = first + chunk.sub_centers;
    const int64_t pairs = int64_t{chunk.n} * chunk.targets;
    const A scale = *static_cast<const A*>(chunk.scale);
    const A* const x_inv = static_cast<const A*>(chunk.x_inv);
    A* const products = static_cast<A*>(chunk.products);
    A dscale = 0;
    for (int64_t row = lane; row < chunk.n; row += kWarp) {
        const DenseClass<A, true> found(chunk, products + row, class_, x_inv[row]);
        const DenseLogit<A, F> logit(found.cosine, scale, at_or(chunk.bias, found.center, A(0)),
                                     at_or(chunk.row_parameter, row, A(0)),
                                     static_cast<const A*>(chunk.constants));
        A g = dense_g(call, logit, row);
        for (int64_t pair = row; pair < pairs; pair += chunk.n)
            g = chunk.y[pair] == chunk.first_class + class_ ? A(0) : g;
        dscale += g * logit.value;
        for (int64_t center = first; center < stop; ++center)
            products[center * chunk.stride + row] = center == found.center ? g * logit.slope : A(0);
    }
    for (int64_t center = first; center < stop; ++center) {
        const A q = at_or(chunk.q, center, A(1));
        const A class_fold = q < A(chunk.inverse_limit) ? q : A(1);
        A dbias = 0;
        for (int64_t row = lane; row < chunk.n; row += kWarp) {
            A& g = products[center * chunk.stride + row];
            dbias += g;
            g *= class_fold * dense_row_fold(chunk, x_inv[row], scale);
        }
        dbias = sum_over_warp(dbias);
        if (lane == 0 && call.dbias) static_cast<A*>(call.dbias)[center] = dbias;
    }
    dscale = sum_over_warp(dscale);
    if (lane == 0 && call.dscale) static_cast<A*>(call.dscale)[class_] = dscale;
}

}  // namespace marginkernels::cuda
