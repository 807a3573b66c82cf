// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The formulas that kernels on every device share. No framework and no device headers are included;
// templates take a float or a vector of floats, so that one definition serves them all.

#pragma once

#include <cstdint>
#include <cstring>

#include "numerics.h"

// Always inlined: a copy compiled for a newer instruction set must never be linked for all.
#define MK_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define MK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MK_HOST_DEVICE MK_INLINE
#endif

namespace mk {

// Operations that T has no operator for. Vector types have a specialisation beside their
// definition.
template <class T>
struct Lanes {
    using Scalar = float;  // of one lane
    using Bits = int32_t;  // integers as wide as the lanes

    static MK_HOST_DEVICE T sqrt(T x) { return __builtin_sqrtf(x); }
};

template <>
struct Lanes<double> {
    using Scalar = double;

    static MK_HOST_DEVICE double sqrt(double x) { return __builtin_sqrt(x); }
};

template <class To, class From>
MK_HOST_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Returns exp(x) within a relative error of 1.2e-7 for x <= 88. It is exactly 0 below
// -kLargestExponent, and so for -inf too.
//
// exp(x) = 2^n exp(f) with n = round(x / ln 2) and |f| <= ln(2) / 2. The polynomial is taken from
// Cephes' expf (S. L. Moshier); n goes into the exponent bits.
template <class T>
MK_HOST_DEVICE T exp(T x) {
    using I = typename Lanes<T>::Bits;
    const T lowest = -kLargestExponent - T{};
    const auto in_range = x >= lowest;
    const T clamped = in_range ? x : lowest;
    constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves the integer in low bits
    const T shifted = clamped * 1.44269504F + kRound;
    const T n = shifted - kRound;
    const T f = clamped - n * 0.693359375F + n * 2.12194440e-4F;
    T p = f * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * f + 8.3334519073e-3F;
    p = p * f + 4.1665795894e-2F;
    p = p * f + 1.6666665459e-1F;
    p = p * f + 5.0000001201e-1F;
    p = p * (f * f) + (f + 1.0F);
    const I power = bit_cast<I>(shifted) << 23;
    const T value = bit_cast<T>(I(bit_cast<I>(p) + power));
    return in_range ? value : T{};
}

MK_HOST_DEVICE double exp(double x) {
    return __builtin_exp(x);
}

// Returns 1 / norm of a row from its sum of squares. A zero row (norm below eps) counts as one of
// norm eps.
MK_HOST_DEVICE float inverse_norm(float sum_of_squares, float eps) {
    const float smallest = eps * eps;
    return 1.0F / __builtin_sqrtf(sum_of_squares < smallest ? smallest : sum_of_squares);
}

}  // namespace mk
