// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors
// Matrix products on tensor cores, with planted bugs.
#pragma once

__device__ __forceinline__ uint32_t smem_u32(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void cp16(void* s, const void* g, bool ok) {
    int n = ok ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_u32(s)), "l"(g),
                 "r"(n));
}
// C[M,N] = A[M,K] B[N,K]^T, BM=BN=64, BK=32, STAGES buffers, 4 warps of 32x32.
// kBug: 0 none, 1 no wait_group, 2 no barrier after the wait, 3 wait_group one too lax, 4 no
// barrier before reuse
template <int STAGES, int kBug>
__global__ void __launch_bounds__(128)
    gemm_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K) {
    constexpr int BM = 64, BN = 64, BK = 32, LD = 40;
    extern __shared__ __align__(16) unsigned char raw[];
    __nv_bfloat16* sA = (__nv_bfloat16*)raw;
    __nv_bfloat16* sB = sA + STAGES * BM * LD;
    int t = threadIdx.x, lane = t & 31, warp = t >> 5, wm = warp >> 1, wn = warp & 1;
    int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
    float acc[2][4][4];
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
            for (int k = 0; k < 4; ++k) acc[i][j][k] = 0.f;
    int nk = (K + BK - 1) / BK;
    auto fill = [&](int kt) {
        int st = kt % STAGES;
        for (int c = t; c < BM * BK / 8; c += 128) {
            int r = c / (BK / 8), q = c % (BK / 8) * 8, k = kt * BK + q;
            bool oka = m0 + r < M && k < K, okb = n0 + r < N && k < K;
            cp16(sA + (st * BM + r) * LD + q, oka ? A + (size_t)(m0 + r) * K + k : A, oka);
            cp16(sB + (st * BN + r) * LD + q, okb ? B + (size_t)(n0 + r) * K + k : B, okb);
        }
    };
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < nk) fill(s);
        asm volatile("cp.async.commit_group;\n");
    }
    for (int kt = 0; kt < nk; ++kt) {
        if (kBug == 3)
            asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 1));
        else if (kBug != 1)
            asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2));
        if (kBug != 2 && kBug != 4) __syncthreads();
        if (kBug == 4 && kt == 0) __syncthreads();
        int nx = kt + STAGES - 1;
        if (nx < nk) fill(nx);
        asm volatile("cp.async.commit_group;\n");
        int st = kt % STAGES;
        for (int kk = 0; kk < BK; kk += 16) {
            uint32_t a[2][4], b[4][2];
            for (int i = 0; i < 2; ++i) {
                uint32_t p = smem_u32(sA + (st * BM + wm * 32 + i * 16 + (lane & 15)) * LD + kk +
                                      (lane >> 4) * 8);
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                             : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3])
                             : "r"(p));
            }
            for (int j = 0; j < 4; ++j) {
                uint32_t p = smem_u32(sB + (st * BN + wn * 32 + j * 8 + (lane & 7)) * LD + kk +
                                      ((lane >> 3) & 1) * 8);
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                             : "=r"(b[j][0]), "=r"(b[j][1])
                             : "r"(p));
            }
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 4; ++j)
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                        : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]),
                          "+f"(acc[i][j][3])
                        : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]),
                          "r"(b[j][1]));
        }
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
            for (int h = 0; h < 2; ++h) {
                int r = m0 + wm * 32 + i * 16 + h * 8 + (lane >> 2),
                    c = n0 + wn * 32 + j * 8 + (lane & 3) * 2;
                if (r < M && c < N) C[(size_t)r * N + c] = acc[i][j][2 * h];
                if (r < M && c + 1 < N) C[(size_t)r * N + c + 1] = acc[i][j][2 * h + 1];
            }
}
#define GEMM(S, BUG)                                                                               \
    template __global__ void gemm_bf16<S, BUG>(const __nv_bfloat16*, const __nv_bfloat16*, float*, \
                                               int, int, int)
GEMM(2, 0);
GEMM(3, 0);
GEMM(4, 0);
GEMM(3, 1);
GEMM(3, 2);
GEMM(3, 3);
GEMM(3, 4);

__global__ void mma_tf32(const float* A, const float* B, float* C) {  // 16x8x8, one warp
    int l = threadIdx.x, g = l >> 2, t = l & 3;
    uint32_t a[4], b[2];
    float av[4] = {A[g * 8 + t], A[(g + 8) * 8 + t], A[g * 8 + t + 4], A[(g + 8) * 8 + t + 4]};
    float bv[2] = {B[t * 8 + g], B[(t + 4) * 8 + g]};
    for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(a[i]) : "f"(av[i]));
    for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b[i]) : "f"(bv[i]));
    float c[4] = {0, 0, 0, 0};
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    C[g * 8 + 2 * t] = c[0];
    C[g * 8 + 2 * t + 1] = c[1];
    C[(g + 8) * 8 + 2 * t] = c[2];
    C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
__global__ void mma_f16_trans(const __half* A, const __half* B,
                              __half* C) {  // 16x8x16, B row-major through .trans, f16 accumulate
    __shared__ __align__(16) __half sA[16 * 16], sB[16 * 8];
    int l = threadIdx.x;
    for (int i = l; i < 256; i += 32) sA[i] = A[i];
    for (int i = l; i < 128; i += 32) sB[i] = B[i];
    __syncwarp();
    uint32_t a[4], b[2], c[2] = {0, 0};
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(smem_u32(sA + (l & 15) * 16 + (l >> 4) * 8)));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(smem_u32(sB + (l & 15) * 8)));
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3,%4,%5},{%6,%7},{%0,%1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    int g = l >> 2, t = l & 3;
    *(uint32_t*)(C + g * 8 + 2 * t) = c[0];
    *(uint32_t*)(C + (g + 8) * 8 + 2 * t) = c[1];
}
__global__ void mma_s8(const int8_t* A, const int8_t* B, int* C) {  // 16x8x32
    int l = threadIdx.x, g = l >> 2, t = l & 3, c[4] = {0, 0, 0, 0};
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i)
        a[i] = *(const uint32_t*)(A + (g + (i & 1) * 8) * 32 + t * 4 + (i >> 1) * 16);
    for (int i = 0; i < 2; ++i)
        b[i] = *(const uint32_t*)(B + g * 32 + t * 4 + i * 16);  // B is [n][k]
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    C[g * 8 + 2 * t] = c[0];
    C[g * 8 + 2 * t + 1] = c[1];
    C[(g + 8) * 8 + 2 * t] = c[2];
    C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
