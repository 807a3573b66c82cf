// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Kernels for the tests: threads, barriers, atomics; the rest is included at the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

__global__ void vadd(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}
__global__ void vadd_oob(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) c[i] = a[i] + b[i];
}
__global__ void misaligned(const char* a, float* c) {
    c[threadIdx.x] = *(const float*)(a + 4 * threadIdx.x + 2);
}

// ---- reductions
__inline__ __device__ float warp_sum(float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
template <bool kSync>
__global__ void block_reduce(const float* x, float* out, int n) {
    __shared__ float part[32];
    float v = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[blockIdx.x * n + i];
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    if (kSync) __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
        v = warp_sum(v);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}
template __global__ void block_reduce<true>(const float*, float*, int);
template __global__ void block_reduce<false>(const float*, float*, int);

__global__ void shuffles(const int* x, int* up, int* down, int* idx, int* seg, int* ballot,
                         int* match, int* red) {
    int t = threadIdx.x, v = x[t];
    up[t] = __shfl_up_sync(~0u, v, 3);
    down[t] = __shfl_down_sync(~0u, v, 5);
    idx[t] = __shfl_sync(~0u, v, (t * 7) & 31);
    seg[t] = __shfl_xor_sync(~0u, v, 1, 8) + __shfl_down_sync(~0u, v, 2, 4);
    ballot[t] = __ballot_sync(~0u, v & 1) + __any_sync(~0u, v > 90) + 2 * __all_sync(~0u, v >= 0);
    match[t] = __match_any_sync(~0u, v & 3);
    red[t] = __reduce_add_sync(~0u, v) + __reduce_max_sync(~0u, v);
}
__global__ void partial_shuffle(float* x) {  // odd lanes only, correctly masked
    int t = threadIdx.x;
    float v = x[t];
    if (t & 1) v += __shfl_xor_sync(0xaaaaaaaau, v, 2);
    x[t] = v;
}
__global__ void bad_shuffle(float* x) {  // names lanes that never arrive
    int t = threadIdx.x;
    float v = x[t];
    if (t & 1) v += __shfl_xor_sync(0xffffffffu, v, 2);
    x[t] = v;
}

// ---- control flow
__global__ void diverge(const int* x, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v = x[i], s = 0;
    while (v != 1) {  // Collatz length
        if (v & 1) {
            if (v > 100) {
                s += 2;
            } else {
                s += 1;
            }
            v = 3 * v + 1;
        } else {
            s += 1;
            v >>= 1;
        }
        if (s > 1000) break;
    }
    switch (i % 6) {
        case 0: s += 10; break;
        case 1: s *= 3; break;
        case 2: s ^= 0x55; break;
        case 3: s = s / 7; break;
        case 4: s = s % 5; break;
        default: s = -s;
    }
    out[i] = s;
}
__device__ __noinline__ float poly(float x, float* cubed, int depth) {
    *cubed = x * x * x;
    return depth > 1 ? x + 1.f : x - 1.f;
}
struct Params {
    const float* a;
    float* o;
    int n;
    float s[3];
    short q;
};
__constant__ float ctab[4] = {1.f, 2.f, 3.f, 4.f};
__device__ int gcount[5] = {10, 20, 30};
template <int N, typename T>
__global__ void by_value(Params p, T* z) {
    __shared__ T sh[N];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float cubed = 0, loc[8];
    for (int j = 0; j < 8; ++j) loc[j] = j * p.s[j % 3];
    if (threadIdx.x < N) sh[threadIdx.x] = (T)(threadIdx.x + p.q);
    __syncthreads();
    if (i < p.n) {
        float v = poly(p.a[i], &cubed, p.n);
        p.o[i] = v + cubed + ctab[i & 3] + loc[i & 7];
        z[i] = sh[i % N];
        atomicAdd(&gcount[i % 5], 1);
    }
}
template __global__ void by_value<8, int>(Params, int*);
template __global__ void by_value<16, float>(Params, float*);
__global__ void say(int n) {
    if (threadIdx.x == 1) printf("n=%d x=%.2f %s\n", n, n * 0.5, "ok");
}
__global__ void asserts(int n) {
    assert(threadIdx.x < n);
}

// ---- atomics
__global__ void atomics(const int* x, int* hist, float* fsum, unsigned long long* big, int* mx,
                        unsigned* ticket, int* order, __nv_bfloat162* bsum, int n) {
    __shared__ int local[16];
    if (threadIdx.x < 16) local[threadIdx.x] = 0;
    __syncthreads();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        atomicAdd(&local[x[i] & 15], 1);
        atomicAdd(fsum, (float)x[i]);
        atomicAdd(big, (unsigned long long)x[i] << 20);
        atomicMax(mx, x[i]);
        order[i] = atomicInc(ticket, 0xffffffffu);
        atomicAdd(bsum, __floats2bfloat162_rn(1.f, 2.f));
    }
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&hist[threadIdx.x], local[threadIdx.x]);
}
__global__ void cas_lock(int* lock, int* counter) {  // one thread per warp takes a spin lock
    if ((threadIdx.x & 31) == 0) {
        while (atomicCAS(lock, 0, 1) != 0) {
        }
        __threadfence();
        *(volatile int*)counter = *(volatile int*)counter + 1;
        __threadfence();
        atomicExch(lock, 0);
    }
}
__global__ void last_block(const float* x, float* part, unsigned* done, float* out) {
    __shared__ bool last;
    float v = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float s = 0;
        for (int b = 0; b < gridDim.x; ++b) s += part[b];
        *out = s;
    }
}

// ---- barriers
__global__ void bar_diverge(int* x) {
    if (threadIdx.x < 16) {
        x[threadIdx.x] = 1;
        __syncthreads();
    } else {
        x[threadIdx.x] = 2;
        __syncthreads();
        x[0] = 3;
    }
}
__global__ void bar_missing(int* x) {
    if (threadIdx.x < 48) {
        x[threadIdx.x] = 1;
        __syncthreads();
        x[threadIdx.x] += 1;
    }
}
__global__ void bar_deadlock(int* x) {
    if (threadIdx.x < 32)
        asm volatile("bar.sync 1, 64;");
    else
        asm volatile("bar.sync 2, 64;");
    x[threadIdx.x] = 1;
}
__global__ void bar_named(int* x) {  // producer/consumer on named barriers
    __shared__ int buf[32];
    int w = threadIdx.x >> 5, l = threadIdx.x & 31;
    for (int it = 0; it < 4; ++it) {
        if (w == 0) {
            buf[l] = it * 100 + l;
            asm volatile("bar.arrive 1, 64;" ::: "memory");
            asm volatile("bar.sync 2, 64;" ::: "memory");
        } else {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            x[it * 32 + l] = buf[31 - l];
            asm volatile("bar.arrive 2, 64;" ::: "memory");
        }
    }
}
__global__ void bar_vote(const int* x, int* out) {
    int t = threadIdx.x;
    out[t] = __syncthreads_count(x[t] > 0) * 100 + (__syncthreads_and(x[t] > -100) ? 10 : 0) +
             (__syncthreads_or(x[t] > 1000) ? 1 : 0);
}
__global__ void uninit(float* o) {
    __shared__ float s[64];
    if (threadIdx.x < 32) s[threadIdx.x] = 1.f;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x];
}
__global__ void shared_oob(float* o) {
    extern __shared__ float d[];
    d[threadIdx.x] = threadIdx.x;
    __syncthreads();
    o[threadIdx.x] = d[threadIdx.x + 1];
}
template <bool kSync>
__global__ void war(float* o) {  // write-after-read between warps
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x;
    __syncthreads();
    float v = s[63 - threadIdx.x];
    if (kSync) __syncthreads();
    s[threadIdx.x] = v + 1.f;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x];
}
template __global__ void war<true>(float*);
template __global__ void war<false>(float*);

// ---- the rest
#include "arithmetic.cuh"
#include "gemm.cuh"
