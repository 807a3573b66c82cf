// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The choice of the instruction set that computes: the best that this processor has, or
// MARGINKERNELS_CPU=default, avx2, avx512 or avx512_bf16 from the environment, as ATen's
// ATEN_CPU_CAPABILITY.

#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace marginkernels {

extern const Kernels k_default;
#if defined(__x86_64__)
extern const Kernels k_avx2;
extern const Kernels k_avx512;
extern const Kernels k_avx512_bf16;  // bf16 compute; everything else is avx512's
#endif

// Returns "default", "avx2", "avx512" or "avx512_bf16". Throws std::runtime_error where
// MARGINKERNELS_CPU is no such name or more than the processor has.
const char* cpu_capability();
std::vector<std::string> cpu_capabilities_compiled();

// Returns the kernels in use for a compute type.
const Kernels& cpu_kernels(Type compute);

}  // namespace marginkernels
