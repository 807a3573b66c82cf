// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launches kernels on a stream, or on the host, where every thread is a fiber.

#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace marginkernels::cuda {

// A kernel that needs more shared memory than this has to ask for it.
constexpr int kDefaultSharedBytes = 48 << 10;

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
    if (shared_bytes > kDefaultSharedBytes)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   shared_bytes));
    // clang-format off
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
    // clang-format on
    check(cudaGetLastError());
#endif
}

}  // namespace marginkernels::cuda
