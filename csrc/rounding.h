// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Stochastic rounding to bf16. The random bits of a number depend on the seed, the step, the class
// and the feature alone, so that the result does not depend on threads, chunks, ranks or devices.
// marginkernels/rounding.py has the same in PyTorch; tests/test_rules.py compares them.

#pragma once

#include "math.h"
#include "numerics.h"

namespace mk {

// 64-bit lanes with a 32-bit word in the low half; what the high half holds is ignored.
template <>
struct Lanes<uint64_t> {
    // Returns the 64-bit products of the words and b.
    static MK_HOST_DEVICE uint64_t product_of_words(uint64_t words, uint32_t b) {
        return uint64_t{static_cast<uint32_t>(words)} * b;
    }
};

template <class T>
struct Words {
    T word[4];
};

// What decides the random bits of a step.
struct Random {
    uint64_t seed;
    uint32_t step;
};

// Returns the words of four features of a class: Philox4x32 (Salmon et al., 2011). T is uint64_t or
// a vector of it. ``quad`` is the first feature over four, ``stream`` which of a class's streams.
template <class T>
MK_HOST_DEVICE Words<T> random_words(Random random, T quad, uint32_t global_class,
                                     uint32_t stream) {
    uint32_t key0 = static_cast<uint32_t>(random.seed);
    uint32_t key1 = static_cast<uint32_t>(random.seed >> 32);
    T c0 = quad, c1 = uint64_t{global_class} + T{};
    T c2 = uint64_t{random.step} + T{}, c3 = uint64_t{stream} + T{};
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const T even = Lanes<T>::product_of_words(c0, 0xD2511F53U);
        const T odd = Lanes<T>::product_of_words(c2, 0xCD9E8D57U);
        c0 = (odd >> 32) ^ c1 ^ uint64_t{key0};
        c1 = odd;
        c2 = (even >> 32) ^ c3 ^ uint64_t{key1};
        c3 = even;
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
    return {{c0, c1, c2, c3}};
}

// A weight and its states have 16 random bits each: number 0 is the weight, number s + 1 state s.
constexpr uint32_t stream_of(int number) {
    return static_cast<uint32_t>(number / 2);
}

// Returns the 16 bits of a number out of the word of its stream: uint32_t, or a vector of it.
template <class Word>
MK_HOST_DEVICE Word bits_of(int number, Word word) {
    return number % 2 == 0 ? word & 0xffffU : word >> 16;
}

// Rounds fp32 numbers to a bf16 neighbour: up in magnitude with the probability of what is cut off.
// ``bits`` are 16 random bits per number. Returns bf16 in the low half of each word. Numbers that
// bf16 has stay as they are, infinities too; NaN stays NaN.
template <class T, class Word>
MK_HOST_DEVICE Word stochastic_bf16(T value, Word bits) {
    const Word exact = bit_cast<Word>(value);
    const Word magnitude = exact & 0x7fffffffU;
    const Word special = magnitude > 0x7f800000U ? exact | 0x400000U : exact;
    return (magnitude < 0x7f800000U ? exact + bits : special) >> 16;
}

}  // namespace mk
