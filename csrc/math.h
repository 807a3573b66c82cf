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

// Returns log(1 + e) for e in [0, 1] within a relative error of 2e-7: 2 atanh(e / (2 + e)) by an
// even polynomial, fitted on [0, 1 / 3].
template <class T>
MK_HOST_DEVICE T log1p_of_unit(T e) {
    const T s = e / (2.0F + e), square = s * s;
    T p = square * 0.28174657F + 0.27961419F;
    p = p * square + 0.40024854F;
    p = p * square + 0.66666316F;
    return s * (p * square + 2.0F);
}

MK_HOST_DEVICE double log1p_of_unit(double e) {
    return __builtin_log1p(e);
}

// log(1 + exp(z)), and its derivative.
template <class T>
struct Softplus {
    T value, slope;
};

// Computes the softplus from e = exp(-|z|), which does not overflow. z may be -inf: 0 and 0.
template <class T>
MK_HOST_DEVICE Softplus<T> softplus(T z, T e) {
    const auto positive = z > T{};
    return {log1p_of_unit(e) + (positive ? z : T{}), (positive ? 1.0F - T{} : e) / (1.0F + e)};
}

// Returns 1 / norm of a row from its sum of squares. A zero row (norm below eps) counts as one of
// norm eps.
MK_HOST_DEVICE float inverse_norm(float sum_of_squares, float eps) {
    const float smallest = eps * eps;
    return 1.0F / __builtin_sqrtf(sum_of_squares < smallest ? smallest : sum_of_squares);
}

}  // namespace mk
