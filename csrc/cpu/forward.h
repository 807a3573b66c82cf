// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The forward sweep of one stripe: per row the largest logit, the sum of exponentials, or of
// softplus, and the targets' cosines; where asked the exponentials to keep, and the sum and maximum
// of the logits.

#pragma once

#include <cmath>

#include "../transforms.h"
#include "blocks.h"

namespace marginkernels {
namespace {

template <class Functor>
constexpr bool is_identity = false;
template <>
constexpr bool is_identity<mk::Identity> = true;

// The biases of a block of classes.
struct Bias {
    const float* values;  // or null
    float operator[](int64_t j) const { return values == nullptr ? 0.0F : values[j]; }
};

Bias bias_of(const Problem& s, int64_t first) {
    return {s.bias == nullptr ? nullptr : s.bias + first};
}

void start_statistics(const ForwardSweep& s, int64_t stripe) {
    for (int64_t i = stripe * s.padded_n; i < (stripe + 1) * s.padded_n; ++i) {
        s.stripe_max[i] = s.fixed_offset ? s.offset : mk::kNoMaximum;
        s.stripe_sum[i] = 0;
        if (s.stripe_logit_max != nullptr) s.stripe_logit_max[i] = mk::kNoMaximum;
        if (s.stripe_logit_sum != nullptr) s.stripe_logit_sum[i] = 0;
    }
}

// Notes the cosines and norms of the targets in this block, and takes the targets out. Their
// products are summed once more, in many lanes and not one after another, because an easy row's
// loss has the error of its target.
void take_targets(const ForwardSweep& s, const Block& block, const Scratch& scratch) {
    for_targets(s, block, [&](int64_t t, int64_t i, int64_t j) {
        const float* row = scratch.rounded + j * scratch.class_stride;
        s.target_cosine[t] =
            dot(s.x_rows + i * s.padded_d, row, s.padded_d) * scratch.q[j] * s.x_inv[i];
        s.w_norm[t] = 1.0F / s.w_inv[block.first + j];
        exclude_target(s, block, i, j, scratch);
    });
}

// Calls f(j, address, z, unbiased, slope) for a vector of rows and each class j of the block in
// turn; the vector begins at ``column`` of the block. z is the logit, after the transform where
// there is one, and unbiased is z without the bias. Both sweeps get the same bits, because an error
// of z in one of them is a relative error of a probability; so products with the scale are rounded
// by one instruction, multiply_add, whether or not there is a bias. A class that was taken out has
// unbiased = -inf; a bias of -inf makes z alone -inf.
template <class Functor, class F>
MK_HOST_DEVICE void for_logits(const Problem& s, Functor, const Block& block, int64_t column,
                               const Scratch& scratch, Bias bias, const F& f) {
    const vfloat scale = load(s.row_scale + block.begin + column);
    const vfloat parameter = load(s.parameter + block.begin + column);
    const int64_t count = block.count;
    for (int64_t j = 0; j < count; ++j) {
        float* at = scratch.logits + j * kLogitsStride + column;
        const vfloat product = load(at) * scratch.q[j];
        const vfloat unbiased = multiply_add(product, scale, vfloat{});
        if constexpr (is_identity<Functor>) {
            f(j, at, multiply_add(product, scale, splat(bias[j])), unbiased, splat(1));
        } else {
            const auto made = Functor::apply(unbiased * (1.0F / s.scale), parameter, s.constants);
            const vfloat z = multiply_add(made.value, splat(s.scale), vfloat{});
            // a class that was taken out stays out
            const vfloat kept = unbiased > mk::kNoMaximum ? z : unbiased;
            f(j, at, kept, kept, made.slope);
        }
    }
}

// log(1 + exp(z)) and its slope, the sigmoid.
MK_HOST_DEVICE mk::Softplus<vfloat> softplus_of(vfloat z) {
    return mk::softplus(z, mk::exp(z > 0 ? -z : z));
}

// Returns the largest logit of each row before a transform.
vfloat largest_logit(const Problem& s, const Block& block, int64_t column, const Scratch& scratch,
                     Bias bias) {
    vfloat largest = splat(mk::kNoMaximum);
    for_logits(s, mk::Identity(), block, column, scratch, bias,
               [&](int64_t, float*, vfloat z, vfloat, vfloat) { largest = max(z, largest); });
    return largest;
}

// Adds a vector of terms to sums.
void add_to(double* sums, vfloat terms) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += terms[lane];
}

// Adds the softplus of a vector of rows of the block to the sums that begin at ``at``, and their
// sigmoids where that sum is wanted. A class that was taken out adds 0.
template <class Functor>
void add_softplus(const ForwardSweep& s, Functor functor, int64_t at, const Block& block,
                  int64_t column, const Scratch& scratch, Bias bias) {
    const bool want_sigmoids = s.stripe_logit_sum != nullptr;
    vfloat total = {}, sigmoids = {};
    for_logits(s, functor, block, column, scratch, bias,
               [&](int64_t, float*, vfloat z, vfloat, vfloat) {
                   const auto made = softplus_of(z);
                   total += made.value;
                   if (want_sigmoids) sigmoids += made.slope;
               });
    add_to(s.stripe_sum + at, total);
    if (want_sigmoids) add_to(s.stripe_logit_sum + at, sigmoids);
}

// Adds the exponentials of a vector of rows of the block to the sums that begin at ``at``, and
// their logits where that sum is wanted. Exponentials replace the logits where they are kept.
template <class Functor>
void add_exponentials(const ForwardSweep& s, Functor functor, int64_t at, const Block& block,
                      int64_t column, const Scratch& scratch, Bias bias) {
    if (s.stripe_logit_sum != nullptr) {
        vfloat total = {};
        for_logits(s, functor, block, column, scratch, bias,
                   [&](int64_t, float*, vfloat z, vfloat unbiased, vfloat) {
                       total += unbiased > mk::kNoMaximum ? z : vfloat{};
                   });
        add_to(s.stripe_logit_sum + at, total);
    }
    const vfloat previous = load(s.stripe_max + at);
    vfloat limit = previous;
    if (!s.fixed_offset)
        for_logits(s, functor, block, column, scratch, bias,
                   [&](int64_t, float*, vfloat z, vfloat, vfloat) { limit = max(z, limit); });
    vfloat total = {};
    const bool keep = s.tiles != nullptr;
    for_logits(s, functor, block, column, scratch, bias,
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

// Adds a vector of rows of the block to the stripe's statistics.
template <class Functor>
void add_statistics(const ForwardSweep& s, Functor functor, int64_t stripe, const Block& block,
                    int64_t column, const Scratch& scratch, Bias bias) {
    const int64_t at = stripe * s.padded_n + block.begin + column;
    if (s.stripe_logit_max != nullptr) {
        const vfloat largest = largest_logit(s, block, column, scratch, bias);
        store(s.stripe_logit_max + at, max(largest, load(s.stripe_logit_max + at)));
    }
    if constexpr (Functor::kOneVersusRest)
        add_softplus(s, functor, at, block, column, scratch, bias);
    else
        add_exponentials(s, functor, at, block, column, scratch, bias);
}

void keep_tiles(const ForwardSweep& s, const Block& block, const Scratch& scratch) {
    for (int64_t j = 0; j < block.count; ++j) {
        const float* from = scratch.logits + j * kLogitsStride;
        const int64_t to = (block.first + j) * s.padded_n + block.begin;
        if (s.compute == Type::kFloat32)
            for (int64_t i = 0; i < block.rows; i += kLanes)
                stream(static_cast<float*>(s.tiles) + to + i, load(from + i));
        else
            for (int64_t i = 0; i < block.rows; i += kLanes)
                store_as<Type::kBFloat16>(s.tiles, to + i, load(from + i));
    }
}

template <class Op>
void forward_stripe(const ForwardSweep& s, int64_t stripe, void* memory) {
    Scratch scratch;
    lay_out(s, false, memory, scratch);
    start_statistics(s, stripe);
    for_classes(s, stripe, [&](int64_t first, int64_t count, int64_t next_end) {
        read_classes<Op>(s, first, count, s.w_inv_out, scratch);
        scratch.ahead = look_ahead<Op>(s, first + count, next_end);
        for_rows(s, first, count, [&](const Block& block) {
            multiply_logits<Op>(s, block, scratch);
            take_targets(s, block, scratch);
            mk::visit(s.transform, [&](auto functor) {
                for (int64_t column = 0; column < block.rows; column += kLanes)
                    add_statistics(s, functor, stripe, block, column, scratch, bias_of(s, first));
            });
            if (s.tiles != nullptr) keep_tiles(s, block, scratch);
        });
    });
}

}  // namespace
}  // namespace marginkernels
