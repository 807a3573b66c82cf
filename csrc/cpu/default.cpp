// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// For any processor: SSE2 on x86-64, which every one has, and NEON on aarch64.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>

#include "dispatch.h"

#define MK_VECTOR_BYTES 16
#if defined(__aarch64__)
#define MK_TILE_VECTORS 4  // 32 registers
#else
#define MK_TILE_VECTORS 2
#endif
#define MK_DEPTH 256
#define MK_BLOCK_CLASSES 96
#include "kernels.h"

const marginkernels::Kernels marginkernels::k_default = kernels<Float32>();
