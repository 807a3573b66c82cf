// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The step of an optimizer: projects a class's gradient and moves its row of w and its state.
//
// What: csrc/update.h's rules and csrc/rounding.h's rounding, a warp per class. Never materialised:
// the gradient of w. Fast because: the row and its gradient stay in registers, so that w and state
// are read once and written once, several numbers at a time.

#pragma once

#include "../rounding.h"
#include "../update.h"
#include "projection.cuh"

namespace marginkernels::cuda {

// A row of numbers in registers, or where kFours = 0 in memory.
template <class A, int kFours>
struct HeldRow {
    Four<A> held[kFours];

    __device__ __forceinline__ explicit HeldRow(A*) {}
    __device__ __forceinline__ Four<A> get(int i, int) const { return held[i]; }
    __device__ __forceinline__ void set(int i, int, const Four<A>& four) { held[i] = four; }
};

template <class A>
struct HeldRow<A, 0> {
    A* memory;

    __device__ __forceinline__ explicit HeldRow(A* memory) : memory(memory) {}
    __device__ __forceinline__ Four<A> get(int, int k) const { return load_four(memory + k); }
    __device__ __forceinline__ void set(int, int k, const Four<A>& four) {
        *reinterpret_cast<Four<A>*>(memory + k) = four;
    }
};

template <class T, class A>
__device__ __forceinline__ void round_all(Four<A>& four) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        T rounded;
        ptx::round_to(rounded, four.v[e]);
        four.v[e] = ptx::to_float(rounded);
    }
}

// Rounds to the type that the sweeps compute in.
template <class A>
__device__ __forceinline__ Four<A> as_computed(Four<A> four, Type compute) {
    if (compute == Type::kBFloat16) round_all<bf16>(four);
    if (compute == Type::kFloat16) round_all<fp16>(four);
    return four;
}

// Rounds the weight (number 0) or a state (1, 2) to how it is stored: bf16 at random.
template <class A>
__device__ __forceinline__ void round_to_stored(bf16& to, A value, int number, uint64_t word) {
    const uint32_t bits = mk::bits_of(number, static_cast<uint32_t>(word));
    to.bits = static_cast<uint16_t>(mk::stochastic_bf16(static_cast<float>(value), bits));
}

template <class T>
__device__ __forceinline__ void round_to_stored(T& to, T value, int, uint64_t) {
    to = value;
}

template <class To, class A>
__device__ __forceinline__ Four<To> rounded_to_stored(const Four<A>& four, int number,
                                                      const mk::Words<uint64_t>& words) {
    Four<To> to;
#pragma unroll
    for (int e = 0; e < 4; ++e) round_to_stored(to.v[e], four.v[e], number, words.word[e]);
    return to;
}

// W and S are the types of weights and state, F is the rule.
template <class A, class W, class S, class F, int kFours>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    update_kernel(const UpdateCall call) {
    const A* const numbers = static_cast<const A*>(call.numbers);
    const int64_t row = row_of_warp();
    if (row >= call.count || numbers[mk::kSkip] != 0) return;
    const int width = call.raw.width, d = call.d;
    const bool vectors = call.vectors;
    const int64_t place = call.index ? call.index[row] : call.first + row;
    const mk::Random random = {static_cast<uint64_t>(call.random[0]),
                               static_cast<uint32_t>(call.random[1])};
    const auto class_id = static_cast<uint32_t>(call.first_class + place);
    A rule[mk::kUpdateNumbers - mk::kOfRule];
#pragma unroll
    for (int i = 0; i < mk::kUpdateNumbers - mk::kOfRule; ++i) rule[i] = numbers[mk::kOfRule + i];

    const RowGradient<A> gradient(call.raw, row);
    W* const w_row = static_cast<W*>(call.w) + place * d;
    HeldRow<A, kFours> g(static_cast<A*>(call.sums) + row * width);
    Four<A> w_held[kFours ? kFours : 1] = {};
    const auto w_at = [&](int i, int k) {
        if constexpr (kFours == 0) {
            return load_up_to_four(w_row, k, d, vectors);
        } else {
            return w_held[i];
        }
    };

    // The gradient along the unit row; then of the row as it is, unscaled and bounded.
    A along = 0;
    for_each_four<kFours>(width, [&](int i, int k) {
        const auto w = load_up_to_four(w_row, k, d, vectors), more = gradient.at(k);
        if (kFours) w_held[i] = w;
        g.set(i, k, more);
        const auto value = as_computed(w, call.compute);
#pragma unroll
        for (int e = 0; e < 4; ++e) along += more.v[e] * value.v[e];
    });
    const A radius = gradient.radius(call.raw.normalize ? along : A(0)),
            unscale = numbers[mk::kUnscale];
    A squares = 0;
    for_each_four<kFours>(width, [&](int i, int k) {
        auto four = g.get(i, k);
        const auto value = as_computed(w_at(i, k), call.compute);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            four.v[e] = gradient.tangent(four.v[e], value.v[e], radius) * unscale;
            squares += four.v[e] * four.v[e];
        }
        g.set(i, k, four);
    });
    const A bound = mk::bound_factor(sum_over_warp(squares), numbers[mk::kMaxRowNorm]);

    // The new state, and the new weights in the place of the gradient: their norm comes first.
    A row_state = 0;
    if constexpr (F::kHasRowState) {
        A* const stored = static_cast<A*>(call.row_state) + place;
        row_state = *stored;
        A terms = 0;
        for_each_four<kFours>(width, [&](int i, int k) {
            const auto four = g.get(i, k), w = w_at(i, k);
#pragma unroll
            for (int e = 0; e < 4; ++e) terms += F::row_term(w.v[e], four.v[e] * bound, rule);
        });
        row_state = F::row_state(row_state, sum_over_warp(terms) / d, rule);
        if (threadIdx.x % kWarp == 0) *stored = row_state;
    }

    constexpr bool kRoundsW = std::is_same_v<W, bf16>, kRoundsState = std::is_same_v<S, bf16>;
    constexpr int kStates = F::kStates;
    constexpr bool kHoldsWords = kRoundsW && kRoundsState && kStates > 0 && kFours > 0;
    mk::Words<uint64_t> words_held[kHoldsWords ? kFours : 1] = {};  // of the first stream
    squares = 0;
    for_each_four<kFours>(width, [&](int i, int k) {
        auto four = g.get(i, k);
        const auto w = w_at(i, k);
        Four<A> state[kStates ? kStates : 1];
        for (int s = 0; s < kStates; ++s)
            state[s] =
                load_up_to_four(static_cast<const S*>(call.state[s]) + place * d, k, d, vectors);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            A of_weight[kStates ? kStates : 1];
            for (int s = 0; s < kStates; ++s) of_weight[s] = state[s].v[e];
            four.v[e] = F::apply(w.v[e], four.v[e] * bound, of_weight, row_state, rule);
            for (int s = 0; s < kStates; ++s) state[s].v[e] = of_weight[s];
            squares += four.v[e] * four.v[e];
        }
        g.set(i, k, four);
        for (int s = 0; s < kStates; ++s) {
            mk::Words<uint64_t> words = {};
            if (kRoundsState)
                words = mk::random_words(random, uint64_t(k / 4), class_id, mk::stream_of(s + 1));
            if (kHoldsWords && s == 0) words_held[i] = words;
            store_up_to_four(static_cast<S*>(call.state[s]) + place * d, k, d, vectors,
                             rounded_to_stored<S>(state[s], s + 1, words));
        }
    });
    // The weights projected and rounded, and the norm that the next forward sweep would find.
    const A least_norm = A(1) / A(call.raw.inverse_limit);
    const A factor = call.project ? mk::unit_factor(sum_over_warp(squares), least_norm) : A(1);
    squares = 0;
    for_each_four<kFours>(width, [&](int i, int k) {
        auto four = g.get(i, k);
#pragma unroll
        for (int e = 0; e < 4; ++e) four.v[e] *= factor;
        mk::Words<uint64_t> words = words_held[kHoldsWords ? i : 0];
        if (kRoundsW && !kHoldsWords)
            words = mk::random_words(random, uint64_t(k / 4), class_id, mk::stream_of(0));
        const auto stored = rounded_to_stored<W>(four, 0, words);
        store_up_to_four(w_row, k, d, vectors, stored);
#pragma unroll
        for (int e = 0; e < 4; ++e) four.v[e] = ptx::to_float(stored.v[e]);
        const auto value = as_computed(four, call.compute);
#pragma unroll
        for (int e = 0; e < 4; ++e) squares += value.v[e] * value.v[e];
    });
    squares = sum_over_warp(squares);
    if (threadIdx.x % kWarp == 0)
        static_cast<A*>(call.w_inv)[row] = inverse_norm(squares, A(call.raw.inverse_limit));
}

}  // namespace marginkernels::cuda
