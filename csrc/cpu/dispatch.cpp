// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace marginkernels {
namespace {

// Whether products of bf16 numbers by AVX-512 are slow here. Processors with matrix units (AMX) do
// one such instruction in two cycles: half the products of their two multiply-adds of fp32 vectors.
// Where a name is asked for, it is taken all the same.
bool has_slow_bf16() {
#if defined(__x86_64__) && !defined(MK_EMULATE)
    constexpr unsigned kAmxBf16 = 1U << 22;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0;
#else
    return false;
#endif
}

struct Capability {
    const char* name;
    bool here;  // whether this processor has it
    const Kernels* kernels;
    const Kernels* bf16_kernels;
};

// from the least to the best
std::vector<Capability> capabilities() {
    std::vector<Capability> all = {{"default", true, &k_default, &k_default}};
#if defined(MK_EMULATE)
    const bool avx2 = true, avx512 = true, bf16 = true;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(__x86_64__)
    all.push_back({"avx2", avx2, &k_avx2, &k_avx2});
    all.push_back({"avx512", avx512, &k_avx512, &k_avx512});
    all.push_back({"avx512_bf16", bf16, &k_avx512, &k_avx512_bf16});
#endif
    return all;
}

bool matches(const std::string& asked, const std::string& name) {
    if (name == "avx512_bf16" && (asked.empty() || asked == "avx512")) return !has_slow_bf16();
    return asked.empty() || asked == name;
}

Capability choose() {
    const std::vector<Capability> all = capabilities();
    const char* const variable = std::getenv("MARGINKERNELS_CPU");
    const std::string asked = variable == nullptr ? "" : variable;
    const Capability* best = nullptr;
    std::string names, problem = "unknown";
    for (const Capability& one : all) {
        names += (names.empty() ? "" : ", ") + std::string(one.name);
        if (!matches(asked, one.name)) continue;
        problem = "which this processor lacks";
        if (one.here) best = &one;
    }
    if (best == nullptr)
        throw std::runtime_error("MARGINKERNELS_CPU: expected one of " + names + ", got '" + asked +
                                 "', " + problem);
    return *best;
}

const Capability& chosen() {
    static const Capability capability = choose();
    return capability;
}

}  // namespace

const char* cpu_capability() {
    return chosen().name;
}

std::vector<std::string> cpu_capabilities_compiled() {
    std::vector<std::string> names;
    for (const Capability& one : capabilities()) names.emplace_back(one.name);
    return names;
}

const Kernels& cpu_kernels(Type compute) {
    return compute == Type::kBFloat16 ? *chosen().bf16_kernels : *chosen().kernels;
}

}  // namespace marginkernels
