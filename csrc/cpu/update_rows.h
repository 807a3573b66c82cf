// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The update of a class's row and of its states by the row's gradient, which is in the cache. One
// pass over the row applies the rule, and a second one, when the norm is known, stores the weights.

#pragma once

#include "../rounding.h"
#include "../update.h"
#include "blocks.h"

namespace marginkernels {
namespace {

// Returns the rows of w, number 0, or of a state.
const WritableRows& rows_of_number(const Update& u, int number) {
    return number == 0 ? u.w : u.states[number - 1];
}

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

// Draws the words of the streams that w and so many states need.
void draw_streams(const Problem& s, const Update& u, int states, uint32_t global_class,
                  const Scratch& scratch) {
    int64_t drawn = -1;
    for (int number = 0; number <= states; ++number) {
        const uint32_t stream = mk::stream_of(number);
        if (rows_of_number(u, number).type != Type::kBFloat16 || drawn == stream) continue;
        draw_words(s, u, global_class, stream, scratch.words[stream]);
        drawn = stream;
    }
}

// A class's row of w, number 0, and those of its states: in place, or where vectors do not fit the
// rows as copies with zeros after them.
struct UpdatedRows {
    char* row[1 + mk::kMostStates];
    Type type[1 + mk::kMostStates];
};

// Calls f with the rows of a class: w's and those of so many states.
template <class F>
MK_HOST_DEVICE void with_rows(const Problem& s, const Update& u, int states, int64_t row,
                              const Scratch& scratch, const F& f) {
    UpdatedRows here, there;
    for (int number = 0; number <= states; ++number) {
        const WritableRows& rows = rows_of_number(u, number);
        const int64_t stride = rows.stride * size_of(rows.type);
        here.type[number] = rows.type;
        there.row[number] = static_cast<char*>(rows.data) + row * stride;
        here.row[number] = there.row[number];
        if (s.d == s.padded_d) continue;
        here.row[number] = reinterpret_cast<char*>(scratch.copies + number * s.padded_d);
        memset(here.row[number], 0, s.padded_d * sizeof(float));
        memcpy(here.row[number], there.row[number], s.d * size_of(rows.type));
    }
    f(here);
    for (int number = 0; number <= states && s.d != s.padded_d; ++number)
        memcpy(there.row[number], here.row[number], s.d * size_of(here.type[number]));
}

MK_HOST_DEVICE vfloat load_number(const UpdatedRows& rows, int number, int64_t k) {
    return rows.type[number] == Type::kFloat32 ? load_as<Type::kFloat32>(rows.row[number], k)
                                               : load_as<Type::kBFloat16>(rows.row[number], k);
}

// Stores a vector of a number, which bf16 rounds with the random words. Returns what is stored.
MK_HOST_DEVICE vfloat store_number(const UpdatedRows& rows, int number, int64_t k, vfloat value,
                                   const uint32_t* words) {
    if (rows.type[number] == Type::kFloat32) {
        store(reinterpret_cast<float*>(rows.row[number]) + k, value);
        return value;
    }
    const vuint bits = mk::bits_of(number, load(words + k));
    const vuint rounded = mk::stochastic_bf16(value, bits);
    store(reinterpret_cast<uint16_t*>(rows.row[number]) + k,
          __builtin_convertvector(rounded, vhalf));
    return mk::bit_cast<vfloat>(vuint(rounded << 16));
}

void scale_row(const Problem& s, float factor, float* row) {
    if (factor == 1) return;
    for (int64_t k = 0; k < s.padded_d; k += kLanes) store(row + k, factor * load(row + k));
}

// Brings the row's state up to this step, where the rule has one, and returns it.
template <class Functor>
float next_row_state(const Problem& s, const Update& u, int64_t row, const UpdatedRows& rows,
                     const float* gradient) {
    if constexpr (Functor::kHasRowState) {
        const float* numbers = u.numbers + mk::kOfRule;
        vfloat total = {};
        for (int64_t k = 0; k < s.padded_d; k += kLanes)
            total += Functor::row_term(load_number(rows, 0, k), load(gradient + k), numbers);
        float& state = u.row_state[row * u.row_state_stride];
        return state = Functor::row_state(state, sum(total) / s.d, numbers);
    } else {
        return 0;
    }
}

// Applies the rule. The states are stored; the new weights take the gradient's place.
template <class Functor>
void apply_rule(const Problem& s, const Update& u, float row_state, const UpdatedRows& rows,
                float* gradient, const Scratch& scratch) {
    for (int64_t k = 0; k < s.padded_d; k += kLanes) {
        vfloat states[mk::kMostStates] = {};
        for (int m = 0; m < Functor::kStates; ++m) states[m] = load_number(rows, m + 1, k);
        store(gradient + k, Functor::apply(load_number(rows, 0, k), load(gradient + k), states,
                                           row_state, u.numbers + mk::kOfRule));
        for (int m = 0; m < Functor::kStates; ++m)
            store_number(rows, m + 1, k, states[m], scratch.words[mk::stream_of(m + 1)]);
    }
}

// Moves swept class j. Its new weights take the gradient's place, and its new inverse norm is
// noted.
template <class Functor>
void update_row(const Problem& s, const Update& u, int64_t j, float* gradient,
                const Scratch& scratch) {
    const int64_t row = row_of(s, j);
    draw_streams(s, u, Functor::kStates, u.first_class + row, scratch);
    scale_row(s, u.numbers[mk::kUnscale], gradient);
    const float bound = u.numbers[mk::kMaxRowNorm];
    if (bound < INFINITY)
        scale_row(s, mk::bound_factor(dot(gradient, gradient, s.padded_d), bound), gradient);
    with_rows(s, u, Functor::kStates, row, scratch, [&](const UpdatedRows& rows) {
        const float row_state = next_row_state<Functor>(s, u, row, rows, gradient);
        apply_rule<Functor>(s, u, row_state, rows, gradient, scratch);
        float* const w = gradient;
        // padding may have become 0 / 0
        memset(w + s.d, 0, (s.padded_d - s.d) * sizeof(float));
        if (u.project)
            scale_row(s, mk::unit_factor(dot(w, w, s.padded_d), least_norm(s.compute)), w);
        for (int64_t k = 0; k < s.padded_d; k += kLanes)
            store(w + k, store_number(rows, 0, k, load(w + k), scratch.words[0]));
        if (u.w.type != s.compute) round_row(s, w);
        u.w_inv[j] = mk::inverse_norm(dot(w, w, s.padded_d), least_norm(s.compute));
    });
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
