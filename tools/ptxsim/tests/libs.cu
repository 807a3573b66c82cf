// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Kernels that use cub, cooperative groups, the pipeline intrinsics and bf16 arithmetic.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

#include <cub/cub.cuh>
namespace cg = cooperative_groups;
__global__ void kcub(const int* x, int* o, float* f) {
    typedef cub::BlockReduce<float, 128> BR;
    typedef cub::BlockScan<int, 128> BS;
    typedef cub::BlockRadixSort<int, 128, 2> RS;
    __shared__ union {
        typename BR::TempStorage a;
        typename BS::TempStorage b;
        typename RS::TempStorage c;
    } t;
    float s = BR(t.a).Sum((float)x[threadIdx.x]);
    if (threadIdx.x == 0) f[0] = s;
    __syncthreads();
    int p;
    BS(t.b).ExclusiveSum(x[threadIdx.x], p);
    o[threadIdx.x] = p;
    __syncthreads();
    int k[2] = {x[threadIdx.x * 2], x[threadIdx.x * 2 + 1]};
    RS(t.c).Sort(k);
    o[128 + threadIdx.x * 2] = k[0];
    o[128 + threadIdx.x * 2 + 1] = k[1];
}
__global__ void kcg(const float* x, float* o, int n) {
    auto b = cg::this_thread_block();
    auto w = cg::tiled_partition<32>(b);
    auto q = cg::tiled_partition<8>(b);
    float v = b.thread_rank() < n ? x[b.thread_rank()] : 0;
    o[b.thread_rank()] = cg::reduce(w, v, cg::plus<float>());
    o[128 + b.thread_rank()] = cg::reduce(q, v, cg::greater<float>());
    b.sync();
    if (b.thread_rank() % 3 == 0) {
        auto c = cg::coalesced_threads();
        o[256 + b.thread_rank()] = c.size() * 100 + c.thread_rank() + c.shfl(v, 0);
    }
}
__global__ void kpipe(const float4* x, float4* o, int n) {
    __shared__ float4 s[2][64];
    int t = threadIdx.x;
    __pipeline_memcpy_async(&s[0][t], &x[t], 16);
    __pipeline_commit();
    for (int i = 0; i < n; i++) {
        if (i + 1 < n) __pipeline_memcpy_async(&s[(i + 1) & 1][t], &x[(i + 1) * 64 + t], 16);
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();
        float4 v = s[i & 1][63 - t];
        v.x = __ldg(&x[0].y) + v.x;
        __stcs(&o[i * 64 + t], v);
        __syncthreads();
    }
}
__global__ void kbf(const __nv_bfloat162* a, const __nv_bfloat162* b, __nv_bfloat162* o) {
    int t = threadIdx.x;
    o[t] = __hadd2(__hmul2(a[t], b[t]), __hmax2(a[t], b[t]));
    o[t + 32] = h2exp(a[t]);
    o[t + 64] = __hsub2(a[t], b[t]);
    o[t + 96] = h2rsqrt(__habs2(a[t]));
}
