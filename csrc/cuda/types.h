// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The number types of the kernels, without CUDA's own headers. 16-bit types are plain bits, which
// ptx.h converts, so that a C++ compiler without CUDA builds every kernel too.

#pragma once

#include <cstdint>

namespace marginkernels::cuda {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

// Accumulation and statistics are fp32, or fp64 where that is the compute type.
template <class T>
struct Statistics {
    using type = float;
};
template <>
struct Statistics<double> {
    using type = double;
};
template <class T>
using statistics_t = typename Statistics<T>::type;

// Four neighbours that are read and written at once.
template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Four {
    T v[4];
};

}  // namespace marginkernels::cuda
