// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The update of a class's row and of its state by the row's gradient, all of which are in the
// cache. fp32 copies are made of the row and its state, moved by the rule, rounded and written
// back.

#pragma once

#include "../rounding.h"
#include "../update.h"
#include "blocks.h"

namespace marginkernels {
namespace {

// Draws the words of a stream for the features of a class.
void draw_words(const Problem& s, const Update& u, uint32_t global_class, uint32_t stream,
                uint32_t* words) {
    constexpr int kQuads = kLanes / 2;  // to a vector
    const mk::Random random = {u.seed, u.step};
    vlong quads;  // in the order that the pairs below undo
    for (int i = 0; i < kQuads; ++i) quads[i] = i / 2 + i % 2 * (kQuads / 2);
    for (int64_t k = 0; k < s.padded_d; k += 2 * kLanes) {
        const auto drawn = mk::random_words(random, quads, global_class, stream);
        const vlong low = (drawn.word[0] & 0xffffffffU) | drawn.word[1] << 32;
        const vlong high = (drawn.word[2] & 0xffffffffU) | drawn.word[3] << 32;
        store(words + k, vuint(first_of_pairs(low, high)));
        store(words + k + kLanes, vuint(second_of_pairs(low, high)));
        quads += kQuads;
    }
}

// Rounds a row to bf16 with the random bits of one of a class's numbers.
void round_by_words(const Problem& s, int number, const uint32_t* words, float* row) {
    for (int64_t k = 0; k < s.padded_d; k += kLanes) {
        const vuint bits = mk::bits_of(number, load(words + k));
        const vuint rounded = mk::stochastic_bf16(load(row + k), bits) << 16;
        store(row + k, mk::bit_cast<vfloat>(rounded));
    }
}

void scale_row(const Problem& s, float factor, float* row) {
    if (factor == 1) return;
    for (int64_t k = 0; k < s.padded_d; k += kLanes) store(row + k, factor * load(row + k));
}

// Brings the row's state up to this step, where the rule has one, and returns it.
template <class Functor>
float next_row_state(const Problem& s, const Update& u, int64_t row, const float* w,
                     const float* gradient) {
    if constexpr (Functor::kHasRowState) {
        const float* numbers = u.numbers + mk::kOfRule;
        vfloat total = {};
        for (int64_t k = 0; k < s.padded_d; k += kLanes)
            total += Functor::row_term(load(w + k), load(gradient + k), numbers);
        float& state = u.row_state[row * u.row_state_stride];
        return state = Functor::row_state(state, sum(total) / s.d, numbers);
    } else {
        return 0;
    }
}

// Applies the rule to fp32 copies: ``w`` and, padded_d further on each, its states.
template <class Functor>
void apply_rule(const Problem& s, const Update& u, float row_state, const float* gradient,
                float* w) {
    for (int64_t k = 0; k < s.padded_d; k += kLanes) {
        vfloat states[mk::kMostStates] = {};
        for (int m = 0; m < Functor::kStates; ++m) states[m] = load(w + (m + 1) * s.padded_d + k);
        store(w + k, Functor::apply(load(w + k), load(gradient + k), states, row_state,
                                    u.numbers + mk::kOfRule));
        for (int m = 0; m < Functor::kStates; ++m) store(w + (m + 1) * s.padded_d + k, states[m]);
    }
}

// Writes the row of w and its states back, those in bf16 rounded.
template <class Functor>
void write_updated(const Problem& s, const Update& u, int64_t row, const Scratch& scratch) {
    int64_t drawn = -1;
    for (int number = 0; number <= Functor::kStates; ++number) {
        const WritableRows& to = number == 0 ? u.w : u.states[number - 1];
        float* values = scratch.updated + number * s.padded_d;
        if (to.type == Type::kBFloat16) {
            const uint32_t stream = mk::stream_of(number);
            if (drawn != stream) draw_words(s, u, u.first_class + row, stream, scratch.words);
            drawn = stream;
            round_by_words(s, number, scratch.words, values);
        }
        write_row(to, row, s.d, values);
    }
}

// Moves swept class j, whose gradient is changed on the way, and notes its new inverse norm.
template <class Functor>
void update_row(const Problem& s, const Update& u, int64_t j, float* gradient,
                const Scratch& scratch) {
    const int64_t row = row_of(s, j);
    float* w = scratch.updated;
    read_row(s, s.w, row, Type::kFloat32, w);
    for (int m = 0; m < Functor::kStates; ++m) {
        const WritableRows& state = u.states[m];
        read_row(s, {state.data, state.stride, state.type}, row, Type::kFloat32,
                 w + (m + 1) * s.padded_d);
    }
    scale_row(s, u.numbers[mk::kUnscale], gradient);
    const float bound = u.numbers[mk::kMaxRowNorm];
    if (bound < INFINITY)
        scale_row(s, mk::bound_factor(dot(gradient, gradient, s.padded_d), bound), gradient);
    const float row_state = next_row_state<Functor>(s, u, row, w, gradient);
    apply_rule<Functor>(s, u, row_state, gradient, w);
    if (u.project) scale_row(s, mk::unit_factor(dot(w, w, s.padded_d), least_norm(s.compute)), w);
    write_updated<Functor>(s, u, row, scratch);
    round_row(s, w);
    u.w_inv[j] = mk::inverse_norm(dot(w, w, s.padded_d), least_norm(s.compute));
}

// Moves ``count`` swept classes from ``first`` on by their gradients (count, padded_d).
void update_rows(const Problem& s, const Update& u, int64_t first, int64_t count, float* gradients,
                 const Scratch& scratch) {
    mk::visit(u.rule, [&](auto functor) {
        for (int64_t j = 0; j < count; ++j)
            update_row<decltype(functor)>(s, u, first + j, gradients + j * s.padded_d, scratch);
    });
}

}  // namespace
}  // namespace marginkernels
