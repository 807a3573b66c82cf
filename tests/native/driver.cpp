// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The CPU sweeps without torch, against the same sums written out in fp64: for sanitizers, for
// emulated instruction sets (-DMK_EMULATE) and for cross-compilers. `make sanitize` runs it for
// every instruction set; the exit status is the number of cases that fail.

#include <cstdio>

#include "../../csrc/cpu/dispatch.h"
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

double norm(const Stored& rows, int64_t i, const Case& one) {
    double total = 0;
    for (int64_t k = 0; k < one.d; ++k) total += std::pow(rows.at(i, k, one.compute), 2);
    return std::sqrt(total);
}

// The same results, dense and in fp64.
struct Expected {
    Matrix lse, target_cosine, w_norm, logit_sum, logit_max, dx, dw, dbias;
    double dscale = 0;

    explicit Expected(const Inputs& in) {
        const Case& one = in.one;
        lse.resize(one.n), logit_max.resize(one.n);
        target_cosine.resize(one.n), w_norm.resize(one.n), logit_sum.resize(one.n);
        dx.resize(one.n * one.d), dw.resize(one.c * one.d), dbias.resize(one.c);
        for (int64_t i = 0; i < one.n; ++i) add_row(in, i);
        if (one.normalize_x) project(dx, in.x, one.n, one);
        if (one.normalize_w) project(dw, in.w, one.c, one);
        for (int64_t i = 0; i < one.n && one.extras; ++i)
            for (int64_t k = 0; k < one.d && in.y[i] >= 0; ++k)
                dw[in.y[i] * one.d + k] +=
                    in.grad_w_norm[i] * in.w.at(in.y[i], k, one.compute) / norm(in.w, in.y[i], one);
    }

  private:
    // The statistics of row i, and its gradients as if norms were held fixed.
    void add_row(const Inputs& in, int64_t i) {
        const Case& one = in.one;
        Matrix z(one.c), factor(one.c);
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int64_t j = 0; j < one.c; ++j) {
            double product = 0;
            for (int64_t k = 0; k < one.d; ++k)
                product += in.x.at(i, k, one.compute) * in.w.at(j, k, one.compute);
            factor[j] = (one.normalize_x ? 1 / norm(in.x, i, one) : 1) *
                        (one.normalize_w ? 1 / norm(in.w, j, one) : 1);
            if (j == in.y[i])
                target_cosine[i] = factor[j] * product, w_norm[i] = norm(in.w, j, one);
            z[j] = in.scale * factor[j] * product + (one.bias ? in.bias[j] : 0);
            if (j != in.y[i]) largest = std::max(largest, z[j]), logit_sum[i] += z[j];
        }
        for (int64_t j = 0; j < one.c; ++j) total += j == in.y[i] ? 0 : std::exp(z[j] - largest);
        logit_max[i] = largest;
        lse[i] = std::isinf(largest) ? largest : largest + std::log(total);
        for (int64_t j = 0; j < one.c; ++j) {
            double g = in.target[i];
            if (j != in.y[i]) {
                g = in.a[i] * std::exp(z[j] - lse[i]) + (one.extras ? in.u[i] : 0);
                dbias[j] += g;
                dscale += g * (z[j] - (one.bias ? in.bias[j] : 0)) / in.scale;
            }
            for (int64_t k = 0; k < one.d; ++k) {
                dx[i * one.d + k] += g * in.scale * factor[j] * in.w.at(j, k, one.compute);
                dw[j * one.d + k] += g * in.scale * factor[j] * in.x.at(i, k, one.compute);
            }
        }
    }

    // Removes the radial part of each row's gradient.
    static void project(Matrix& gradient, const Stored& rows, int64_t count, const Case& one) {
        for (int64_t i = 0; i < count; ++i) {
            double radial = 0;
            for (int64_t k = 0; k < one.d; ++k)
                radial += gradient[i * one.d + k] * rows.at(i, k, one.compute);
            radial /= std::pow(norm(rows, i, one), 2);
            for (int64_t k = 0; k < one.d; ++k)
                gradient[i * one.d + k] -= radial * rows.at(i, k, one.compute);
        }
    }
};

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
    for (int64_t i = 0; i < one.n; ++i)  // no negatives: -inf in both
        if (std::isinf(want.lse[i]) && got.lse[i] == want.lse[i]) want.lse[i] = got.lse[i] = 0;
    check("lse", wide(got.lse), want.lse, 1, fine);
    check("target_cosine", wide(got.target_cosine), want.target_cosine, 1, fine);
    check("w_norm", wide(got.w_norm), want.w_norm, 1, fine);
    check("dx", got.dx.values(), want.dx, one.d, bound(one.x_type));
    check("dw", got.swept_dw(), want.dw, one.d, bound(one.w_type));
    if (one.extras) {
        if (one.c > 1) check("logit_max", wide(got.logit_max), want.logit_max, 1, fine);
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
