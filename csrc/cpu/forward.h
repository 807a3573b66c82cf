// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The forward sweep of one stripe: per row the largest logit, the sum of exponentials, the target's
// logit; where asked exponentials to keep, the sum and the largest of the logits themselves.

#pragma once

#include <cmath>

#include "../transforms.h"
#include "blocks.h"

namespace marginkernels {
namespace {

template <class T>
constexpr bool is_identity = false;
template <>
constexpr bool is_identity<mk::Identity> = true;

struct Bias {
    const float* values;  // of the block, or null
    float operator[](int64_t j) const { return values == nullptr ? 0.0F : values[j]; }
};

Bias bias_of(const Sweep& s, int64_t first) {
    return {s.bias == nullptr ? nullptr : s.bias + first};
}

void start_statistics(const Sweep& s, int64_t stripe) {
    for (int64_t i = stripe * s.padded_n; i < (stripe + 1) * s.padded_n; ++i) {
        s.stripe_max[i] = s.fixed_offset ? s.offset : mk::kNoMaximum;
        s.stripe_sum[i] = 0;
        if (s.want_max) s.stripe_logit_max[i] = mk::kNoMaximum;
        if (s.want_sum) s.stripe_logit_sum[i] = 0;
    }
}

// Notes what the targets in this block are and takes them out of it. Their products are summed once
// more: in many lanes, not one after another, because an easy row's loss has the error of its
// target.
void take_targets(const Sweep& s, int64_t begin, int64_t rows, int64_t first, int64_t count,
                  const Scratch& scratch) {
    for_targets(s, begin, smaller(begin + rows, s.n), first, count, [&](int64_t i, int64_t j) {
        const float* row = scratch.rounded + j * scratch.class_stride;
        s.d_out[i] = dot(s.x_rows + i * s.padded_d, row, s.padded_d) * scratch.q[j] * s.x_inv[i];
        s.w_norm[i] = 1.0F / s.w_inv[first + j];
        scratch.logits[j * kLogitsStride + i - begin] = -INFINITY;
    });
}

// A vector of rows, all classes of the block in turn: z, z before the bias, and the transform's
// slope. Both sweeps get the same bits: an error of z in one of them is a relative error of a
// probability. z before the bias is -inf where a class was taken out, not where its bias is.
template <class T, class F>
MK_HOST_DEVICE void for_logits(const Sweep& s, T, int64_t row, int64_t column, int64_t count,
                               const Scratch& scratch, Bias bias, const F& f) {
    const vfloat scale = load(s.row_scale + row);
    const vfloat parameter = load(s.parameter + row);
    for (int64_t j = 0; j < count; ++j) {
        float* at = scratch.logits + j * kLogitsStride + column;
        const vfloat product = load(at) * scratch.q[j];
        const vfloat unbiased = multiply_add(product, scale, vfloat{});
        if constexpr (is_identity<T>) {
            f(j, at, multiply_add(product, scale, splat(bias[j])), unbiased, splat(1));
        } else {
            const auto made = T::apply(unbiased * (1.0F / s.scale), parameter, s.constants);
            const vfloat z = multiply_add(made.value, splat(s.scale), vfloat{});
            // what was taken out stays out
            const vfloat kept = unbiased > mk::kNoMaximum ? z : unbiased;
            f(j, at, kept, kept, made.slope);
        }
    }
}

// The largest of the logits themselves, whatever a transform makes of them.
vfloat largest_logit(const Sweep& s, int64_t row, int64_t column, int64_t count,
                     const Scratch& scratch, Bias bias) {
    vfloat largest = splat(mk::kNoMaximum);
    for_logits(s, mk::Identity(), row, column, count, scratch, bias,
               [&](int64_t, float*, vfloat z, vfloat, vfloat) { largest = max(z, largest); });
    return largest;
}

// Adds a vector of rows of the block to the stripe's statistics.
template <class T>
void add_statistics(const Sweep& s, T transform, int64_t stripe, int64_t row, int64_t column,
                    int64_t count, const Scratch& scratch, Bias bias) {
    const int64_t at = stripe * s.padded_n + row;
    if (s.want_max) {
        const vfloat largest = largest_logit(s, row, column, count, scratch, bias);
        store(s.stripe_logit_max + at, max(largest, load(s.stripe_logit_max + at)));
    }
    if (s.want_sum) {
        vfloat total = {};
        for_logits(s, transform, row, column, count, scratch, bias,
                   [&](int64_t, float*, vfloat z, vfloat unbiased, vfloat) {
                       total += unbiased > mk::kNoMaximum ? z : vfloat{};
                   });
        for (int64_t lane = 0; lane < kLanes; ++lane) s.stripe_logit_sum[at + lane] += total[lane];
    }
    const vfloat previous = load(s.stripe_max + at);
    vfloat limit = previous;
    if (!s.fixed_offset)
        for_logits(s, transform, row, column, count, scratch, bias,
                   [&](int64_t, float*, vfloat z, vfloat, vfloat) { limit = max(z, limit); });
    vfloat total = {};
    const bool keep = s.tiles != nullptr;
    for_logits(s, transform, row, column, count, scratch, bias,
               [&](int64_t j, float* to, vfloat z, vfloat, vfloat) {
                   const vfloat e = mk::exp(z - limit);
                   total += e;
                   if (keep) store(to, e * scratch.q[j]);
               });
    const vfloat shrink = mk::exp(previous - limit);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        double& sum = s.stripe_sum[at + lane];
        sum = sum * shrink[lane] + total[lane];
    }
    store(s.stripe_max + at, limit);
}

void keep_tiles(const Sweep& s, int64_t begin, int64_t rows, int64_t first, int64_t count,
                const Scratch& scratch) {
    for (int64_t j = 0; j < count; ++j) {
        const float* from = scratch.logits + j * kLogitsStride;
        const int64_t to = (first + j) * s.padded_n + begin;
        if (s.compute == Type::kFloat32)
            for (int64_t i = 0; i < rows; i += kLanes)
                stream(static_cast<float*>(s.tiles) + to + i, load(from + i));
        else
            for (int64_t i = 0; i < rows; i += kLanes)
                store_as<Type::kBFloat16>(s.tiles, to + i, load(from + i));
    }
}

template <class Op>
void forward(const Sweep& s, int64_t stripe, void* memory) {
    Scratch scratch;
    lay_out(s, false, memory, scratch);
    start_statistics(s, stripe);
    for_blocks(s, stripe, [&](int64_t first, int64_t count) {
        read_classes<Op>(s, first, count, true, scratch);
        for (int64_t begin = 0; begin < s.padded_n; begin += kBlockRows) {
            const int64_t rows = smaller(kBlockRows, s.padded_n - begin);
            multiply_logits<Op>(s, begin, rows, count, scratch);
            take_targets(s, begin, rows, first, count, scratch);
            mk::visit(s.transform, [&](auto transform) {
                for (int64_t column = 0; column < rows; column += kLanes)
                    add_statistics(s, transform, stripe, begin + column, column, count, scratch,
                                   bias_of(s, first));
            });
            if (s.tiles != nullptr) keep_tiles(s, begin, rows, first, count, scratch);
        }
    });
}

}  // namespace
}  // namespace marginkernels
