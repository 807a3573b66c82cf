// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Conversion of rows of any type to fp32 numbers, rounded to the compute type, and back; norms and
// projections.

#pragma once

#include "problem.h"
#include "simd.h"

namespace marginkernels {
namespace {

template <Type kType>
MK_HOST_DEVICE vfloat load_as(const void* data, int64_t at) {
    if constexpr (kType == Type::kFloat32) return load(static_cast<const float*>(data) + at);
    const auto half = *reinterpret_cast<const vhalf_at*>(static_cast<const uint16_t*>(data) + at);
    return kType == Type::kBFloat16 ? from_bf16(half) : from_fp16(half);
}

template <Type kType>
MK_HOST_DEVICE vfloat round_to(vfloat v) {
    if constexpr (kType == Type::kBFloat16) return round_to_bf16(v);
    if constexpr (kType == Type::kFloat16) return round_to_fp16(v);
    return v;
}

template <Type kType>
MK_HOST_DEVICE void store_as(void* data, int64_t at, vfloat v) {
    v = round_to<kType>(v);
    if constexpr (kType == Type::kFloat32)
        store(static_cast<float*>(data) + at, v);
    else
        store(static_cast<uint16_t*>(data) + at,
              kType == Type::kBFloat16 ? to_bf16(v) : to_fp16(v));
}

template <Type kType>
struct Tag {
    static constexpr Type value = kType;
};

// Calls f(Tag<type>) for a type that is known at run time.
template <class F>
MK_HOST_DEVICE void with_type(Type type, const F& f) {
    switch (type) {
        case Type::kFloat32: return f(Tag<Type::kFloat32>());
        case Type::kBFloat16: return f(Tag<Type::kBFloat16>());
        case Type::kFloat16: return f(Tag<Type::kFloat16>());
    }
}

// Reads row i, rounded to a type, as fp32 and with zeros from d to padded_d.
void read_row(const Problem& s, const Rows& rows, int64_t i, Type rounded_to, float* out) {
    const char* row = static_cast<const char*>(rows.data) + i * rows.stride * size_of(rows.type);
    const int64_t whole = s.d / kLanes * kLanes;
    // numbers that fill no vector go through one that is zero elsewhere
    float rest[kLanes] = {};
    memcpy(rest, row + whole * size_of(rows.type), (s.d - whole) * size_of(rows.type));
    with_type(rows.type, [&](auto from) {
        with_type(rounded_to, [&](auto to) {
            constexpr Type kFrom = decltype(from)::value, kTo = decltype(to)::value;
            for (int64_t k = 0; k < whole; k += kLanes)
                store(out + k, round_to<kTo>(load_as<kFrom>(row, k)));
            if (whole < s.padded_d) store(out + whole, round_to<kTo>(load_as<kFrom>(rest, 0)));
        });
    });
}

// Rounds a row to the compute type.
void round_row(const Problem& s, float* row) {
    with_type(s.compute, [&](auto to) {
        for (int64_t k = 0; k < s.padded_d; k += kLanes)
            store(row + k, round_to<decltype(to)::value>(load(row + k)));
    });
}

// Writes the first d numbers of ``values`` to row i, past the cache where the address allows it.
void write_row(const WritableRows& rows, int64_t i, int64_t d, const float* values) {
    const Type type = rows.type;
    char* row = static_cast<char*>(rows.data) + i * rows.stride * size_of(type);
    const int64_t whole = d / kLanes * kLanes;
    if (type == Type::kFloat32 && reinterpret_cast<uintptr_t>(row) % sizeof(vfloat) == 0) {
        for (int64_t k = 0; k < whole; k += kLanes)
            stream(reinterpret_cast<float*>(row) + k, load(values + k));
    } else {
        with_type(type, [&](auto to) {
            for (int64_t k = 0; k < whole; k += kLanes)
                store_as<decltype(to)::value>(row, k, load(values + k));
        });
    }
    if (whole == d) return;
    float rest[kLanes];
    with_type(type, [&](auto to) { store_as<decltype(to)::value>(rest, 0, load(values + whole)); });
    memcpy(row + whole * size_of(type), rest, (d - whole) * size_of(type));
}

float dot(const float* a, const float* b, int64_t padded_d) {
    vfloat total[4] = {};  // as many as hide the latency of the addition
    int64_t k = 0;
    for (; k + 4 * kLanes <= padded_d; k += 4 * kLanes)
        for (int v = 0; v < 4; ++v)
            total[v] = load(a + k + v * kLanes) * load(b + k + v * kLanes) + total[v];
    for (; k < padded_d; k += kLanes) total[0] = load(a + k) * load(b + k) + total[0];
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Adds factor * from to ``to``.
void add_scaled(float* to, float factor, const float* from, int64_t padded_d) {
    for (int64_t k = 0; k < padded_d; k += kLanes)
        store(to + k, factor * load(from + k) + load(to + k));
}

bool is_zero_row(float inverse_norm, Type compute) {
    return inverse_norm >= mk::inverse_norm(0, least_norm(compute));
}

// Turns the gradient of the unit row, times 1 / norm, into the gradient of the row: removes its
// radial part, and all of it for a zero row.
void project(float* gradient, const float* row, float inverse_norm, const Problem& s) {
    if (is_zero_row(inverse_norm, s.compute)) {
        memset(gradient, 0, s.padded_d * sizeof(float));
        return;
    }
    // along the unit row: the factor of a small row might overflow
    const float radial = dot(gradient, row, s.padded_d) * inverse_norm;
    for (int64_t k = 0; k < s.padded_d; k += kLanes)
        store(gradient + k, -radial * (inverse_norm * load(row + k)) + load(gradient + k));
}

// Narrows fp32 values that bf16 represents exactly.
void narrow(const float* values, int64_t count, uint16_t* out) {
    for (int64_t k = 0; k < count; k += kLanes) store(out + k, to_bf16(load(values + k)));
}

// Returns units of two bf16 numbers, the first one in the low half.
MK_HOST_DEVICE vfloat bf16_units(vfloat first, vfloat second) {
    const vuint low = mk::bit_cast<vuint>(first) >> 16;
    return mk::bit_cast<vfloat>(vuint(low | (mk::bit_cast<vuint>(second) & 0xffff0000U)));
}

MK_HOST_DEVICE float bf16_unit(float first, float second) {
    const uint32_t low = mk::bit_cast<uint32_t>(first) >> 16;
    return mk::bit_cast<float>(low | (mk::bit_cast<uint32_t>(second) & 0xffff0000U));
}

}  // namespace
}  // namespace marginkernels
