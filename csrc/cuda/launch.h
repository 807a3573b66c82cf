// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launches kernels on a stream, or on the host, where every thread is a fiber.

#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "types.h"

namespace marginkernels::cuda {

#if !defined(MK_ON_HOST)
// Lets a kernel have so much dynamic shared memory, for which L1 gives way. The runtime is asked
// once for each kernel and device (device.cu).
cudaError_t allow_shared(const void* kernel, int bytes);
#endif

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int shared_bytes, Stream stream, const Arguments&... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7FFFFFFF)
        throw std::runtime_error(std::string(name) +
                                 ": too many blocks: " + std::to_string(blocks));
#if defined(MK_ON_HOST)
    (void)stream;
    fibers::launch(name, kernel, dim3(static_cast<unsigned>(blocks)),
                   dim3(static_cast<unsigned>(threads)), shared_bytes, arguments...);
#else
    const auto check = [&](cudaError_t error) {
        if (error != cudaSuccess)
            throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    };
    if (shared_bytes > 0) check(allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes));
    // clang-format off
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    // clang-format on
    check(cudaGetLastError());
#endif
}

// Calls f with a value of the type.
template <class F>
void with_type(Type type, F&& f) {
    switch (type) {
        case Type::kFloat32: return f(float());
        case Type::kFloat64: return f(double());
        case Type::kBFloat16: return f(bf16());
        case Type::kFloat16: return f(fp16());
    }
}

inline int64_t blocks_of(int64_t count, int per_block) {
    return (count + per_block - 1) / per_block;
}

}  // namespace marginkernels::cuda
