// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Runs CUDA C++ on the host: g++ -x c++ -include fibers.h compiles kernels without any CUDA header,
// and fibers::launch runs each CUDA thread of a block as a fiber.
//
// Schedules are adversarial, so that a missing barrier shows as a wrong result. Between two block
// barriers one warp, drawn at random, runs as far as it can before the next one starts, its lanes
// in random order. Shared memory holds NaN bytes when a block starts, and so does the destination
// of an asynchronous copy until the wait that promises it.
//
// Errors name block and thread. Found are barriers that some threads miss or meet elsewhere, warp
// operations without all of their lanes, deadlocks, copies that no thread waited for, and shared
// addresses out of bounds or misaligned.
//
// Not modelled: grids and blocks of more than one dimension, static __shared__ arrays, operations
// of a part of a warp, atomics, caches and memory order between warps, time.

#pragma once

#define MK_ON_HOST 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#include "cuda_names.h"
#include "fiber_launch.h"
#include "fiber_memory.h"
#include "fiber_sync.h"
