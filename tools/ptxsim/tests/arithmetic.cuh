// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors
// Arithmetic and conversions, one column of the output for each function.
#pragma once

__global__ void math32(const float* x, const float* y, float* o, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i >= n) return;
    float a = x[i], b = y[i];
    float* p = o + (size_t)i * 24;
    p[0] = sinf(a);
    p[1] = cosf(a);
    p[2] = expf(b);
    p[3] = logf(fabsf(a) + 1e-3f);
    p[4] = sqrtf(fabsf(a));
    p[5] = rsqrtf(fabsf(b) + 1e-3f);
    p[6] = a / b;
    p[7] = fmaf(a, b, a);
    p[8] = acosf(a / (fabsf(a) + 1.f));
    p[9] = atan2f(a, b);
    p[10] = tanhf(b);
    p[11] = erff(b);
    p[12] = powf(fabsf(a) + 0.1f, b);
    p[13] = fmodf(a, b);
    p[14] = truncf(a);
    p[15] = rintf(a);
    p[16] = floorf(a);
    p[17] = __expf(b);
    p[18] = __fdividef(a, b);
    p[19] = exp2f(b);
    p[20] = fminf(a, b);
    p[21] = fmaxf(a, b);
    p[22] = copysignf(a, b);
    p[23] = cbrtf(a);
}
__global__ void math64(const double* x, const double* y, double* o, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i >= n) return;
    double a = x[i], b = y[i];
    double* p = o + (size_t)i * 8;
    p[0] = a / b;
    p[1] = sqrt(fabs(a));
    p[2] = exp(b);
    p[3] = log(fabs(a) + 1e-3);
    p[4] = sin(a);
    p[5] = fma(a, b, -a * b);
    p[6] = (double)(long long)a;
    p[7] = rint(a);
}
__global__ void ints(const int* x, const int* y, const long long* u, long long* o, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i >= n) return;
    int a = x[i], b = y[i];
    long long c = u[i];
    unsigned ua = a, ub = b;
    long long* p = o + (size_t)i * 24;
    p[0] = a / b;
    p[1] = a % b;
    p[2] = ua / ub;
    p[3] = ua % ub;
    p[4] = __mulhi(a, b);
    p[5] = __umulhi(ua, ub);
    p[6] = __popc(a);
    p[7] = __clz(a);
    p[8] = __brev(a);
    p[9] = __ffs(a);
    p[10] = c / a;
    p[11] = c % b;
    p[12] = __mul64hi(c, (long long)a * b);
    p[13] = __funnelshift_l(ua, ub, 7);
    p[14] = __byte_perm(ua, ub, 0x6240);
    p[15] = a >> (b & 31);
    p[16] = c << (b & 63);
    p[17] = (long long)((unsigned long long)c >> (a & 63));
    p[18] = __dp4a(a, b, 5);
    p[19] = abs(a);
    p[20] = (short)a;
    p[21] = (unsigned char)a;
    p[22] = __clzll(c);
    p[23] = min(a, b) + max(ua, ub);
}
__global__ void converts(const float* x, float* o, int* q, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    if (i >= n) return;
    float a = x[i];
    o[i * 8 + 0] = __bfloat162float(__float2bfloat16_rn(a));
    o[i * 8 + 1] = __half2float(__float2half_rn(a));
    o[i * 8 + 2] = __half2float(__float2half_rz(a));
    __nv_bfloat162 v = __floats2bfloat162_rn(a, a * 3.f), w = __hfma2(v, v, v);
    o[i * 8 + 3] = __low2float(w);
    o[i * 8 + 4] = __high2float(w);
    __half2 h = __floats2half2_rn(a, a * 0.5f), g = __hadd2(h, __hmul2(h, h));
    o[i * 8 + 5] = __low2float(g);
    o[i * 8 + 6] = __high2float(g);
    o[i * 8 + 7] = __fadd_rz(a, 1e-3f);
    q[i * 6 + 0] = __float2int_rn(a);
    q[i * 6 + 1] = __float2int_rz(a * 1e8f);
    q[i * 6 + 2] = __float2int_rd(a);
    q[i * 6 + 3] = __float2uint_rn(a);
    q[i * 6 + 4] = __float_as_int(__int2float_rz(__float_as_int(a)));
    q[i * 6 + 5] = (signed char)a;
}
#if __CUDA_ARCH__ >= 900 || defined(HOPPER)
__global__ void vec_atomics(float* x) {
    atomicAdd((float4*)x, make_float4(1.f, 2.f, 3.f, 4.f));
    atomicAdd((float2*)(x + 4), make_float2(5.f, 6.f));
}
#endif
