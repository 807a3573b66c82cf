// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Measures what the cores can do at best: multiply-adds between registers, in fp32 and in bf16 with
// fp32 accumulation. peaks.py compiles it with -march=native. The loops touch no memory.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
// enough independent sums to cover latency times throughput, few enough for 16 registers
constexpr int kSums = 12;
constexpr int kIterations = 6'000'000;  // about 20 ms at one vector per cycle and 3.6 GHz

typedef float vector_t __attribute__((vector_size(kVectorBytes)));

// read at run time, so that nothing can be folded
volatile float decay = 0.999F, increment = 1e-3F;
volatile float sink;

// every sum starts elsewhere: equal ones would be computed once
template <class Vector>
void start(Vector (&sums)[kSums]) {
    for (int k = 0; k < kSums; ++k) sums[k] = Vector{} + static_cast<float>(k) * increment;
}

template <class Vector>
void keep(const Vector (&sums)[kSums]) {
    Vector total = {};
    for (const auto& sum : sums) total += sum;
    sink = total[0];
}

double fma_loop(int iterations) {
    const vector_t a = vector_t{} + decay, b = vector_t{} + increment;
    vector_t sums[kSums];
    start(sums);
    for (int i = 0; i < iterations; ++i) {
        // the sum is the factor: a product of two constants would be moved out of the loop
        for (auto& sum : sums) sum = sum * a + b;
    }
    keep(sums);
    return 2.0 * kLanes * kSums * iterations;
}

#ifdef __AVX512BF16__
double bf16_loop(int iterations) {
    const __m512 a_wide = _mm512_set1_ps(decay), b_wide = _mm512_set1_ps(increment);
    const __m512bh a = _mm512_cvtne2ps_pbh(a_wide, a_wide), b = _mm512_cvtne2ps_pbh(b_wide, b_wide);
    __m512 sums[kSums];
    start(sums);
    for (int i = 0; i < iterations; ++i) {
        for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
    }
    keep(sums);
    return 2.0 * 32 * kSums * iterations;
}
#endif

// the calling thread to the t-th core it may use: two threads that a scheduler leaves on one core
// for a while would halve the peak
void pin([[maybe_unused]] int t) {
#ifdef __linux__
    cpu_set_t allowed, chosen;
    CPU_ZERO(&chosen);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed) && t-- == 0) CPU_SET(cpu, &chosen);
    }
    if (CPU_COUNT(&chosen) == 1) sched_setaffinity(0, sizeof chosen, &chosen);
#endif
}

// GFLOP/s of all threads together, from the first start to the last end
double gflops(int threads, double (*loop)(int)) {
    using clock = std::chrono::steady_clock;
    std::vector<clock::time_point> begin(threads), end(threads);
    std::vector<double> flops(threads);
    std::vector<std::thread> workers;
    std::atomic<int> ready{0};
    for (int t = 0; t < threads; ++t) {
        workers.emplace_back([&, t] {
            pin(t);
            loop(kIterations / 8);  // lets the clock rise
            for (++ready; ready.load() < threads;) std::this_thread::yield();
            begin[t] = clock::now();
            flops[t] = loop(kIterations);
            end[t] = clock::now();
        });
    }
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double> elapsed =
        *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
    double total = 0;
    for (double f : flops) total += f;
    return total / elapsed.count() * 1e-9;
}

}  // namespace

extern "C" double fma_gflops(int threads) {
    return gflops(threads, fma_loop);
}

// NaN where the instruction set has no bf16 dot product
extern "C" double bf16_gflops([[maybe_unused]] int threads) {
#ifdef __AVX512BF16__
    return gflops(threads, bf16_loop);
#else
    return std::numeric_limits<double>::quiet_NaN();
#endif
}
