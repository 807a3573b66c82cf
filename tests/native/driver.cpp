// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The CPU sweeps without torch, against the same sums written out in fp64: for sanitizers, for
// emulated instruction sets (-DMK_EMULATE) and for cross-compilers. `make sanitize` runs it for
// every instruction set; the exit status is the number of cases that fail.

#include <cstdio>

#include "../../csrc/cpu/dispatch.h"
#include "expected.h"
#include "steps.h"

namespace {

// Returns the largest row error over the largest row norm, or over 1e-3 where all is smaller.
double relative_error(const Matrix& got, const Matrix& want, int64_t width) {
    double worst = 0, largest = 1e-6;
    for (size_t at = 0; at < want.size(); at += width) {
        double error = 0, norm = 0;
        for (int64_t k = 0; k < width; ++k) {
            error += std::pow(got[at + k] - want[at + k], 2);
            norm += std::pow(want[at + k], 2);
        }
        if (!(error <= worst)) worst = error;  // NaN stays
        largest = std::max(largest, norm);
    }
    return std::sqrt(worst / largest);
}

template <class T>
Matrix wide(const std::vector<T>& values) {
    return Matrix(values.begin(), values.end());
}

// Runs a case; prints each result that is off and returns whether none is.
bool run(const Case& one) {
    const Inputs in(one);
    Results got(in);
    Expected want(in);
    bool good = true;
    const double fine = 2e-5, coarse = one.compute == Type::kBFloat16 ? 1e-2 : 2e-5;
    const auto bound = [&](Type type) { return type == Type::kBFloat16 ? 1e-2 : coarse; };
    const auto check = [&](const char* name, const Matrix& ours, const Matrix& exact, int64_t width,
                           double bound) {
        const double error = relative_error(ours, exact, width);
        if (error <= bound) return;
        good = false;
        std::printf("  %s: relative error %.2g, at most %.2g\n", name, error, bound);
    };
    // no negatives: -inf in both
    const auto drop_infinite = [](std::vector<float>& ours, Matrix& exact) {
        for (size_t i = 0; i < ours.size(); ++i)
            if (std::isinf(exact[i]) && ours[i] == exact[i]) ours[i] = exact[i] = 0;
    };
    drop_infinite(got.lse, want.lse);
    drop_infinite(got.logit_max, want.logit_max);
    check("lse", wide(got.lse), want.lse, 1, fine);
    check("target_cosine", wide(got.target_cosine), want.target_cosine, 1, fine);
    check("w_norm", wide(got.w_norm), want.w_norm, 1, fine);
    check("dx", got.dx.values(), want.dx, one.d, bound(one.x_type));
    check("dw", got.swept_dw(), want.dw, one.d, bound(one.w_type));
    if (one.extras) {
        check("logit_max", wide(got.logit_max), want.logit_max, 1, fine);
        check("logit_sum", wide(got.logit_sum), want.logit_sum, 1, fine);
        check("dbias", wide(got.dbias), want.dbias, 1, 1e-4);
        check("dscale", {got.dscale}, {want.dscale}, 1, 1e-3);
    }
    run_steps(
        in, got, want.dw,
        [&](const char* name, const Matrix& ours, const Matrix& exact) {
            check(name, ours, exact, one.d, bound(one.w_type));
        },
        [&](const char* name, bool same) {
            if (!same) std::printf("  %s: other bits\n", name);
            good = good && same;
        });
    return good;
}

}  // namespace

int main() {
    constexpr Type f = Type::kFloat32, b = Type::kBFloat16;
    const Case cases[] = {
        {1, 1, 2, f, f, f, true, true, false, false, false},
        {1, 1, 3, b, f, f, true, true, false, true, false},
        {5, 7, 31, f, f, f, true, true, false, true, false},
        {37, 301, 48, f, f, f, true, true, false, false, true},
        {37, 301, 48, b, b, f, true, true, false, false, true},
        {19, 260, 500, f, f, b, true, true, false, true, false},
        {70, 131, 513, b, f, f, true, true, false, true, false},
        {300, 257, 40, f, f, f, true, true, false, true, false},
        {300, 257, 40, b, f, f, true, true, false, true, false},
        {530, 129, 17, b, b, b, true, true, false, false, false},
        {23, 210, 33, f, f, f, false, true, true, false, true},
        {23, 210, 33, b, f, f, false, false, true, false, true},
        {23, 210, 33, f, f, f, false, false, false, false, false},
        {37, 301, 48, f, f, f, true, true, false, true, false, true},
        {37, 301, 47, b, b, b, true, true, false, false, true, true},
        {0, 40, 20, f, f, f, true, true, false, false, false},
        // several targets, several centres, one versus rest
        {37, 301, 48, f, f, f, true, true, false, false, true, false, 3},
        {300, 7, 33, b, b, f, false, false, true, false, true, true, 9},
        {37, 300, 48, f, f, f, true, true, false, false, true, false, 1, 3},
        {300, 264, 31, b, b, f, true, true, false, false, false, false, 2, 4},
        {23, 390, 40, f, f, b, false, true, true, false, true, true, 3, 5},
        {19, 411, 17, b, f, f, true, true, false, false, false, false, 1, 137},
        {1, 3, 7, f, f, f, true, true, false, false, true, false, 1, 3},
        {37, 301, 48, f, f, f, true, true, false, false, true, false, 1, 1, true},
        {300, 258, 48, b, b, b, true, true, false, false, true, true, 2, 3, true},
    };
    int failed = 0, passed = 0;
    for (const Case& one : cases) {
        const bool good = run(one);
        ++(good ? passed : failed);
        if (!good)
            std::printf("FAILED: (N, C, D) = (%ld, %ld, %ld), compute %s\n", long(one.n),
                        long(one.c), long(one.d), one.compute == b ? "bf16" : "fp32");
    }
    std::printf("%s: %d passed, %d failed\n", cpu_capability(), passed, failed);
    return failed;
}
