// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The results of a case, dense and in fp64.

#pragma once

#include "case.h"

namespace {

double norm(const Stored& rows, int64_t i, const Case& one) {
    double total = 0;
    for (int64_t k = 0; k < one.d; ++k) total += std::pow(rows.at(i, k, one.compute), 2);
    return std::sqrt(total);
}

// The logits of a row of x.
struct Logits {
    Matrix factor;  // r_i q_j / scale
    Matrix cosine;  // with the norm of a side that is not normalised
    Matrix f, slope;
    std::vector<bool> out;  // which take no part in the sums

    Logits(const Inputs& in, int64_t i)
        : factor(in.one.c), cosine(in.one.c), slope(in.one.c, 1), out(in.one.c) {
        const Case& one = in.one;
        for (int64_t j = 0; j < one.c; ++j) {
            double product = 0;
            for (int64_t k = 0; k < one.d; ++k)
                product += in.x.at(i, k, one.compute) * in.w.at(j, k, one.compute);
            factor[j] = (one.normalize_x ? 1 / norm(in.x, i, one) : 1) *
                        (one.normalize_w ? 1 / norm(in.w, j, one) : 1);
            cosine[j] = factor[j] * product;
            auto made = mk::Identity::apply(cosine[j], 0.0, kConstants);
            if (one.one_versus_rest) made = OneVersusRest::apply(cosine[j], 0.0, kConstants);
            f.push_back(in.scale * made.value + (one.bias ? in.bias[j] : 0));
            slope[j] = made.slope;
        }
        for (int64_t first = 0; first < one.c; first += one.centers) take_out(in, i, first);
    }

  private:
    // Takes out the class that begins at this row of w where it is a target's, else all its centres
    // but one.
    void take_out(const Inputs& in, int64_t i, int64_t first) {
        const int64_t end = first + in.one.centers, *const y = in.y.data() + i * in.one.targets;
        const bool is_target = std::any_of(
            y, y + in.one.targets, [&](int64_t label) { return label >= first && label < end; });
        const auto best = std::max_element(cosine.begin() + first, cosine.begin() + end);
        for (int64_t j = first; j < end; ++j) out[j] = is_target || j != best - cosine.begin();
    }
};

struct Expected {
    Matrix lse, target_cosine, w_norm, logit_sum, logit_max, dx, dw, dbias;
    double dscale = 0;

    explicit Expected(const Inputs& in) {
        const Case& one = in.one;
        lse.resize(one.n), logit_max.resize(one.n), logit_sum.resize(one.n);
        target_cosine.resize(in.y.size()), w_norm.resize(in.y.size());
        dx.resize(one.n * one.d), dw.resize(one.c * one.d), dbias.resize(one.c);
        for (int64_t i = 0; i < one.n; ++i) {
            const Logits logits(in, i);
            add_sums(in, i, logits);
            add_negatives(in, i, logits);
            add_targets(in, i, logits);
        }
        if (one.normalize_x) project(dx, in.x, one.n, one);
        if (one.normalize_w) project(dw, in.w, one.c, one);
        for (size_t t = 0; t < in.y.size() && one.extras; ++t)
            for (int64_t k = 0, j = in.y[t]; k < one.d && j >= 0; ++k)
                dw[j * one.d + k] +=
                    in.grad_w_norm[t] * in.w.at(j, k, one.compute) / norm(in.w, j, one);
    }

  private:
    void add_sums(const Inputs& in, int64_t i, const Logits& logits) {
        const Case& one = in.one;
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        logit_max[i] = largest;
        for (int64_t j = 0; j < one.c; ++j) {
            if (logits.out[j]) continue;
            const double f = logits.f[j], z = in.scale * logits.cosine[j];
            logit_max[i] = std::max(logit_max[i], z + (one.bias ? in.bias[j] : 0));
            logit_sum[i] += one.one_versus_rest ? 1 / (1 + std::exp(-f)) : f;
            largest = std::max(largest, f);
        }
        for (int64_t j = 0; j < one.c; ++j)
            if (!logits.out[j])
                total += one.one_versus_rest ? std::log1p(std::exp(logits.f[j]))
                                             : std::exp(logits.f[j] - largest);
        lse[i] = one.one_versus_rest   ? total
                 : std::isinf(largest) ? largest
                                       : largest + std::log(total);
    }

    void add_negatives(const Inputs& in, int64_t i, const Logits& logits) {
        const Case& one = in.one;
        for (int64_t j = 0; j < one.c; ++j) {
            if (logits.out[j]) continue;
            const double f = logits.f[j];
            double g =
                in.a[i] * (one.one_versus_rest ? 1 / (1 + std::exp(-f)) : std::exp(f - lse[i]));
            if (one.extras && !one.one_versus_rest) g += in.u[i];
            dbias[j] += g;
            dscale += g * (f - (one.bias ? in.bias[j] : 0)) / in.scale;
            add_gradient(in, i, j, g * logits.slope[j] * logits.factor[j]);
        }
    }

    void add_targets(const Inputs& in, int64_t i, const Logits& logits) {
        for (int64_t t = i * in.one.targets; t < (i + 1) * in.one.targets; ++t) {
            const int64_t j = in.y[t];
            if (j < 0) continue;
            target_cosine[t] = logits.cosine[j], w_norm[t] = norm(in.w, j, in.one);
            add_gradient(in, i, j, in.target[t] * logits.factor[j]);
        }
    }

    // Adds the gradients of a logit, times scale, as if norms were held fixed.
    void add_gradient(const Inputs& in, int64_t i, int64_t j, double g) {
        const Case& one = in.one;
        for (int64_t k = 0; k < one.d; ++k) {
            dx[i * one.d + k] += g * in.scale * in.w.at(j, k, one.compute);
            dw[j * one.d + k] += g * in.scale * in.x.at(i, k, one.compute);
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

}  // namespace
