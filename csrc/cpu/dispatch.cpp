// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace marginkernels {
namespace {

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

// "avx512" includes the bf16 products of the processors that have them.
bool matches(const std::string& asked, const std::string& name) {
    return asked.empty() || asked == name || (asked == "avx512" && name == "avx512_bf16");
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
