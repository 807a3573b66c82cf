// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// GEMMs with wgmma in CUDA C++: C = A B^T, 64 x 64 per CTA of 128 threads, K a multiple of 64,
// tiles of 64 x 64 in rows of 128 bytes, swizzled. BUG plants a mistake.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

enum {
    NO_BUG,
    NO_WAIT,
    NO_ARRIVE,
    NO_PROXY_FENCE,
    NO_BARRIER,
    EARLY_COPY,
    NO_COPY_WAIT,
    UNSWIZZLED,
    NO_COMMIT
};

__device__ uint32_t smem_address(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ uint64_t descriptor(uint32_t address) {
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

template <typename T>
__device__ void product(float (&d)[32], uint64_t a, uint64_t b, int keep);

#define PRODUCT(TYPE, NAME)                                                                       \
    template <>                                                                                   \
    __device__ void product<TYPE>(float (&d)[32], uint64_t a, uint64_t b, int keep) {             \
        asm volatile(                                                                             \
            "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"                                             \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                           \
            " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "  \
            "%18, %19, %20, %21,"                                                                 \
            "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}\n"      \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
              "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),          \
              "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),       \
              "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
              "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),       \
              "+f"(d[31])                                                                         \
            : "l"(a), "l"(b), "r"(keep));                                                         \
    }
PRODUCT(__nv_bfloat16, "bf16")
PRODUCT(__half, "f16")

// rows row0.. of a (rows, K) matrix, columns k0.. k0 + 63
template <typename T, int BUG>
__device__ void copy(T* tile, const T* m, int row0, int k0, int K) {
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        int r = i / 8, c = i % 8;
        uint32_t to = smem_address(tile) + r * 128 + ((BUG == UNSWIZZLED ? c : c ^ (r % 8)) * 16);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
                     "l"(m + (size_t)(row0 + r) * K + k0 + c * 8));
    }
}

template <typename T, int BUG>
__global__ void gemm(const T* a, const T* b, float* c, int N, int K) {
    extern __shared__ __align__(1024) char raw[];
    T* tiles = reinterpret_cast<T*>(raw);  // two stages of A, B
    float d[32] = {};
    int steps = K / 64;
    auto fetch = [&](int s) {
        copy<T, BUG>(tiles + s % 2 * 8192, a, blockIdx.y * 64, s * 64, K);
        copy<T, BUG>(tiles + s % 2 * 8192 + 4096, b, blockIdx.x * 64, s * 64, K);
        asm volatile("cp.async.commit_group;");
    };
    fetch(0);
    for (int s = 0; s < steps; ++s) {
        if (BUG == EARLY_COPY && s + 1 < steps) fetch(s + 1);
        if (BUG != NO_COPY_WAIT)
            asm volatile("cp.async.wait_group %0;" ::"n"(BUG == EARLY_COPY ? 1 : 0));
        if (BUG != NO_PROXY_FENCE) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        if (BUG != NO_BARRIER) __syncthreads();
        if (BUG != NO_ARRIVE) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        uint32_t at = smem_address(tiles + s % 2 * 8192);
        for (int k = 0; k < 4; ++k)
            product<T>(d, descriptor(at + 32 * k), descriptor(at + 8192 + 32 * k), s + k);
        if (BUG != NO_COMMIT) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (BUG != EARLY_COPY && s + 1 < steps)
            fetch(s + 1);  // into the other stage, whose products are complete
        if (BUG != NO_WAIT) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    int row = blockIdx.y * 64 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4,
        col = blockIdx.x * 64 + threadIdx.x % 4 * 2;
    for (int i = 0; i < 32; ++i)
        c[(size_t)(row + i / 2 % 2 * 8) * N + col + i / 4 * 8 + i % 2] = d[i];
}

#define INSTANCES(B)                                                                            \
    template __global__ void gemm<__nv_bfloat16, B>(const __nv_bfloat16*, const __nv_bfloat16*, \
                                                    float*, int, int);                          \
    template __global__ void gemm<__half, B>(const __half*, const __half*, float*, int, int);
INSTANCES(NO_BUG)
INSTANCES(NO_WAIT)
INSTANCES(NO_ARRIVE)
INSTANCES(NO_PROXY_FENCE)
INSTANCES(NO_BARRIER)
INSTANCES(EARLY_COPY)
INSTANCES(NO_COPY_WAIT)
INSTANCES(UNSWIZZLED)
INSTANCES(NO_COMMIT)
