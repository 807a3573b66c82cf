// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Wraps every machine instruction that CUDA C++ has no name for. Each has a twin for the host,
// where tests run the kernels with a fiber for every thread (MK_ON_HOST).

#pragma once

#include <cmath>
#include <cstring>

#include "types.h"

namespace marginkernels::cuda::ptx {

#if defined(MK_ON_HOST)

inline float to_float(bf16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float to_float(fp16 value) {
    _Float16 half;
    std::memcpy(&half, &value, sizeof half);
    return half;
}

inline void round_to(bf16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    to.bits = static_cast<uint16_t>(value == value ? nearest_even : 0x7FFF);
}

inline void round_to(fp16& to, float value) {
    const auto half = static_cast<_Float16>(value);
    std::memcpy(&to, &half, sizeof half);
}

template <class T>
uint32_t pack(float low, float high) {
    T both[2];
    round_to(both[0], low);
    round_to(both[1], high);
    uint32_t bits;
    std::memcpy(&bits, both, sizeof bits);
    return bits;
}

inline float exp2(float x) {
    return exp2f(x);
}

inline uint32_t shared_memory() {
    return fibers::shared_address(fibers::shared_memory());
}

template <class T>
T* shared_array() {
    return reinterpret_cast<T*>(fibers::shared_memory());
}

inline void copy_async(uint32_t shared, const void* global, bool there) {
    fibers::copy_async(fibers::at_shared(shared, 16), global, 16, there ? 16 : 0);
}

inline void commit_async() {
    fibers::commit_async();
}

template <int kGroupsLeft>
void wait_async() {
    fibers::wait_async(kGroupsLeft);
}

inline void load_matrices(uint32_t (&registers)[4], uint32_t row) {
    struct Lane {
        uint32_t* registers;
        const char* row;
    } mine{registers, static_cast<const char*>(fibers::at_shared(row, 16))};
    fibers::warp("ldmatrix", mine, [](auto& lanes) {
        for (int lane = 0; lane < 32; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix)
                std::memcpy(&lanes[lane]->registers[matrix],
                            lanes[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
    });
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine{c, a, b};
    fibers::warp("mma", mine, [](auto& lanes) {
        const auto put = [](double* two, uint32_t bits) {
            T halves[2];
            std::memcpy(halves, &bits, sizeof bits);
            two[0] = to_float(halves[0]);
            two[1] = to_float(halves[1]);
        };
        double rows[16][16], columns[8][16];  // the features of a row are next to each other
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, k = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) put(&rows[g + i % 2 * 8][k + i / 2 * 8], lanes[lane]->a[i]);
            for (int i = 0; i < 2; ++i) put(&columns[g][k + i * 8], lanes[lane]->b[i]);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const double* row = rows[lane / 4 + i / 2 * 8];
                const double* column = columns[lane % 4 * 2 + i % 2];
                double sum = lanes[lane]->c[i];
                for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                lanes[lane]->c[i] = static_cast<float>(sum);
            }
        }
    });
}

#else

__device__ __forceinline__ float to_float(bf16 value) {
    return __uint_as_float(uint32_t{value.bits} << 16);
}

__device__ __forceinline__ float to_float(fp16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ __forceinline__ void round_to(bf16& to, float value) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

__device__ __forceinline__ void round_to(fp16& to, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

// Packs two neighbours into 32 bits, `low` first.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Computes 2^x within two units in the last place; 0 at -inf.
__device__ __forceinline__ float exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Returns where the block's shared memory starts, as the instructions below address it.
__device__ __forceinline__ uint32_t shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Returns the block's shared memory, for plain reads and writes.
template <class T>
__device__ __forceinline__ T* shared_array() {
    extern __shared__ __align__(1024) char memory[];
    return reinterpret_cast<T*>(memory);
}

// Starts a copy of 16 bytes that takes no registers, or writes 16 zeros. wait_async waits for it.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_async() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all copies of this thread but the last kGroupsLeft groups.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Loads four 8 x 8 matrices of 16 bits. Lanes 8 i to 8 i + 7 name the 16-byte rows of matrix i.
// Lane l gets the two numbers from 2 (l % 4) on in row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
}

// Adds a (16 x 16) times b (16 x 8) to c (16 x 8), on the tensor cores of a warp, in fp32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// Conversions between equal types, so that kernels are written once for all types.
__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ double to_float(double value) {
    return value;
}
__device__ __forceinline__ void round_to(float& to, float value) {
    to = value;
}
__device__ __forceinline__ double exp2(double x) {
    return ::exp2(x);
}
__device__ __forceinline__ float fma(float a, float b, float c) {
    return fmaf(a, b, c);
}
__device__ __forceinline__ double fma(double a, double b, double c) {
    return ::fma(a, b, c);
}

// Rounds fp64 results to any type.
template <class T>
__device__ __forceinline__ void round_to(T& to, double value) {
    round_to(to, static_cast<float>(value));
}
__device__ __forceinline__ void round_to(double& to, double value) {
    to = value;
}

}  // namespace marginkernels::cuda::ptx
