// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

// standard headers come first: their functions are shared with code for older processors
#if defined(MK_EMULATE)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define MK_VECTOR_BYTES 64
#define MK_TILE_VECTORS 4
#define MK_DEPTH 128
#define MK_BLOCK_CLASSES 126
#include "kernels.h"

const marginkernels::Kernels marginkernels::k_avx512 = kernels<Float32>();

#if defined(__clang__) && !defined(MK_EMULATE)
#pragma clang attribute pop
#endif

#endif
