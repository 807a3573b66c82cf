// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Vectors of MK_VECTOR_BYTES in the compiler's own vector types: the same source is AVX-512, AVX2,
// SSE2 or NEON. Intrinsics do what those types cannot (bf16 dot products, stores past the cache);
// with MK_EMULATE plain C++ takes their place, so that every variant can be tested anywhere.

#pragma once

#include <cstdint>

#include "../math.h"

namespace marginkernels {
namespace {

typedef float vfloat __attribute__((vector_size(MK_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(MK_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(MK_VECTOR_BYTES)));
typedef uint64_t vlong __attribute__((vector_size(MK_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(MK_VECTOR_BYTES / 2)));
// the same at any address
typedef float vfloat_at __attribute__((vector_size(MK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t vuint_at __attribute__((vector_size(MK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vhalf_at __attribute__((vector_size(MK_VECTOR_BYTES / 2), aligned(2), may_alias));

constexpr int64_t kLanes = MK_VECTOR_BYTES / sizeof(float);

MK_HOST_DEVICE vfloat load(const float* p) {
    return *reinterpret_cast<const vfloat_at*>(p);
}

MK_HOST_DEVICE void store(float* p, vfloat v) {
    *reinterpret_cast<vfloat_at*>(p) = v;
}

MK_HOST_DEVICE void store(uint16_t* p, vhalf v) {
    *reinterpret_cast<vhalf_at*>(p) = v;
}

MK_HOST_DEVICE vuint load(const uint32_t* p) {
    return *reinterpret_cast<const vuint_at*>(p);
}

MK_HOST_DEVICE void store(uint32_t* p, vuint v) {
    *reinterpret_cast<vuint_at*>(p) = v;
}

MK_HOST_DEVICE vfloat splat(float value) {
    return value - vfloat{};
}

MK_HOST_DEVICE vfloat max(vfloat a, vfloat b) {
    return a > b ? a : b;
}

// Returns a b + c, rounded once where the processor can. From a product and a sum the compiler
// makes such an instruction or not, as it likes in each place. Places that must give the same bits
// call this.
MK_HOST_DEVICE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(MK_EMULATE) || (defined(__x86_64__) && MK_VECTOR_BYTES == 16)
    return a * b + c;
#elif !defined(__x86_64__)
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#elif MK_VECTOR_BYTES == 32
    return vfloat(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return vfloat(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#endif
}

MK_HOST_DEVICE float sum(vfloat v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

// Stores past the cache numbers that are not read again soon; p is aligned to the vector.
MK_HOST_DEVICE void stream(float* p, vfloat v) {
#if defined(MK_EMULATE) || MK_VECTOR_BYTES == 16
    store(p, v);
#elif MK_VECTOR_BYTES == 32
    _mm256_stream_ps(p, __m256(v));
#else
    _mm512_stream_ps(p, __m512(v));
#endif
}

// Pairs of 64-bit lanes: of every two lanes the first ones, or the second ones, of a and b.

MK_HOST_DEVICE vlong first_of_pairs(vlong a, vlong b) {
#if defined(MK_EMULATE) || !defined(__x86_64__)
    for (int i = 0; i < kLanes / 2; i += 2) a[i + 1] = b[i];
    return a;
#elif MK_VECTOR_BYTES == 16
    return vlong(_mm_unpacklo_epi64(__m128i(a), __m128i(b)));
#elif MK_VECTOR_BYTES == 32
    return vlong(_mm256_unpacklo_epi64(__m256i(a), __m256i(b)));
#else
    return vlong(_mm512_maskz_unpacklo_epi64(0xff, __m512i(a), __m512i(b)));
#endif
}

MK_HOST_DEVICE vlong second_of_pairs(vlong a, vlong b) {
#if defined(MK_EMULATE) || !defined(__x86_64__)
    for (int i = 0; i < kLanes / 2; i += 2) b[i] = a[i + 1];
    return b;
#elif MK_VECTOR_BYTES == 16
    return vlong(_mm_unpackhi_epi64(__m128i(a), __m128i(b)));
#elif MK_VECTOR_BYTES == 32
    return vlong(_mm256_unpackhi_epi64(__m256i(a), __m256i(b)));
#else
    return vlong(_mm512_maskz_unpackhi_epi64(0xff, __m512i(a), __m512i(b)));
#endif
}

// bf16: the upper half of an fp32 number

MK_HOST_DEVICE vfloat from_bf16(vhalf bits) {
    return mk::bit_cast<vfloat>(vuint(__builtin_convertvector(bits, vuint) << 16));
}

// Rounds v to the nearest bf16 number, ties to even; NaN stays NaN.
MK_HOST_DEVICE vfloat round_to_bf16(vfloat v) {
    const vuint bits = mk::bit_cast<vuint>(v);
    const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000U;
    return v == v ? mk::bit_cast<vfloat>(rounded) : v;
}

// Narrows a v that bf16 represents exactly.
MK_HOST_DEVICE vhalf to_bf16(vfloat v) {
    return __builtin_convertvector(vuint(mk::bit_cast<vuint>(v) >> 16), vhalf);
}

// fp16: five exponent bits, biased by 15; fp32 has eight, biased by 127

MK_HOST_DEVICE vfloat from_fp16(vhalf half) {
    const vuint bits = __builtin_convertvector(half, vuint);
    // the multiplication moves the exponent, and normalises subnormal numbers
    vfloat magnitude = mk::bit_cast<vfloat>(vuint((bits & 0x7fff) << 13)) * 0x1p112F;
    const vuint special = mk::bit_cast<vuint>(magnitude) | 0x7f800000U;
    magnitude = magnitude >= 65536.0F ? mk::bit_cast<vfloat>(special) : magnitude;
    return mk::bit_cast<vfloat>(vuint(mk::bit_cast<vuint>(magnitude) | ((bits & 0x8000) << 16)));
}

// Rounds v to the nearest fp16 number, ties to even; inf from 65520 on, NaN stays NaN.
MK_HOST_DEVICE vfloat round_to_fp16(vfloat v) {
    const vuint bits = mk::bit_cast<vuint>(v);
    const vuint sign = bits & 0x80000000U;
    const vfloat magnitude = mk::bit_cast<vfloat>(vuint(bits ^ sign));
    const vuint normal = ((bits ^ sign) + 0xfff + ((bits >> 13) & 1)) & 0xffffe000U;
    // below 2^-14 the last place is 2^-24, as for fp32 numbers between 0.5 and 1
    const vfloat subnormal = (magnitude + 0.75F) - 0.75F;
    vfloat rounded = magnitude < 0x1p-14F ? subnormal : mk::bit_cast<vfloat>(normal);
    rounded = rounded >= 65536.0F ? splat(__builtin_inff()) : rounded;
    rounded = mk::bit_cast<vfloat>(vuint(mk::bit_cast<vuint>(rounded) | sign));
    return v == v ? rounded : v;
}

// Narrows a v that fp16 represents exactly.
MK_HOST_DEVICE vhalf to_fp16(vfloat v) {
    const vuint bits = mk::bit_cast<vuint>(v);
    const vuint sign = (bits >> 16) & 0x8000;
    const vfloat magnitude = mk::bit_cast<vfloat>(vuint(bits & 0x7fffffff));
    const vuint normal = (mk::bit_cast<vuint>(magnitude) >> 13) - (112 << 10);
    const vuint subnormal = mk::bit_cast<vuint>(__builtin_convertvector(magnitude * 0x1p24F, vint));
    const vuint special = (mk::bit_cast<vuint>(magnitude) >> 13 & 0x3ff) | 0x7c00;
    const vuint finite = magnitude < 0x1p-14F ? subnormal : normal;
    return __builtin_convertvector(vuint((magnitude < 65536.0F ? finite : special) | sign), vhalf);
}

}  // namespace
}  // namespace marginkernels

template <>
struct mk::Lanes<marginkernels::vfloat> {
    using Scalar = float;
    using Bits = marginkernels::vint;

    static MK_HOST_DEVICE marginkernels::vfloat sqrt(marginkernels::vfloat x) {
#if defined(MK_EMULATE) || !defined(__x86_64__)
        for (int i = 0; i < marginkernels::kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
        return x;
#elif MK_VECTOR_BYTES == 16
        return marginkernels::vfloat(_mm_sqrt_ps(__m128(x)));
#elif MK_VECTOR_BYTES == 32
        return marginkernels::vfloat(_mm256_sqrt_ps(__m256(x)));
#else
        // the unmasked form warns of an uninitialised value in GCC 12
        return marginkernels::vfloat(_mm512_maskz_sqrt_ps(0xffff, __m512(x)));
#endif
    }
};

template <>
struct mk::Lanes<marginkernels::vlong> {
    static MK_HOST_DEVICE marginkernels::vlong product_of_words(marginkernels::vlong words,
                                                                uint32_t b) {
#if defined(MK_EMULATE) || !defined(__x86_64__)
        return (words & 0xffffffffU) * uint64_t{b};
#elif MK_VECTOR_BYTES == 16
        return marginkernels::vlong(_mm_mul_epu32(__m128i(words), _mm_set1_epi32(int(b))));
#elif MK_VECTOR_BYTES == 32
        return marginkernels::vlong(_mm256_mul_epu32(__m256i(words), _mm256_set1_epi32(int(b))));
#else
        return marginkernels::vlong(
            _mm512_maskz_mul_epu32(0xff, __m512i(words), _mm512_set1_epi32(int(b))));
#endif
    }
};
