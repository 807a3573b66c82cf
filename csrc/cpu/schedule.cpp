// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"

namespace marginkernels {
namespace {

constexpr int64_t kStripes = 16;
// partial sums of dx may take this much, and always one stripe per thread
constexpr int64_t kPartialBytes = 32 << 20;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Uninitialised and aligned to a cache line.
template <class T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
    const size_t bytes = round_up_to(std::max<int64_t>(count, 1) * sizeof(T), 64);
    void* const p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

// f(index, scratch) for all indices, which go to whichever thread is free.
template <class F>
void for_each(const Parallel& parallel, int64_t count, size_t scratch_bytes, const F& f) {
    std::atomic<int64_t> next{0};
    parallel.run([&] {
        const auto scratch = allocate<char>(scratch_bytes);
        for (int64_t i = next++; i < count; i = next++) f(i, scratch.get());
    });
}

int64_t panels(int64_t columns, const Kernels& kernels) {
    return (columns + kernels.panel_rows - 1) / kernels.panel_rows;
}

// Blocks of fewer classes where rows are long, so that a block stays in the cache; a multiple of
// the micro-kernel's rows, and even.
int64_t classes_per_block(int64_t padded_d, const Kernels& kernels) {
    constexpr int64_t kRowOfFullBlock = 512, kStep = 6;
    const int64_t fitting = kernels.block_classes * kRowOfFullBlock / padded_d;
    return std::clamp(fitting / kStep * kStep, 4 * kStep, kernels.block_classes);
}

// a copy with zeros up to the padded length
std::vector<float> padded(const float* values, int64_t n, int64_t padded_n) {
    std::vector<float> copy(padded_n, 0.0F);
    if (values != nullptr) std::copy(values, values + n, copy.begin());
    return copy;
}

// What both sweeps need of x, and how the classes are cut. Owns what it points ``s`` to.
struct Prepared {
    std::unique_ptr<float[], Free> rows, panel_data, scale;
    std::vector<float> parameter;

    Prepared(Sweep& s, const Kernels& kernels, const Parallel& parallel) {
        s.padded_n = round_up_to(s.n, mk::kTilePadding);
        s.padded_d = round_up_to(s.d, kernels.lanes);
        s.block_classes = classes_per_block(s.padded_d, kernels);
        const int64_t blocks = (s.c + s.block_classes - 1) / s.block_classes;
        const int64_t bytes = std::max<int64_t>(1, s.n * s.padded_d * sizeof(float));
        const int64_t most = std::clamp<int64_t>(kPartialBytes / bytes, parallel.threads,
                                                 std::max<int64_t>(kStripes, parallel.threads));
        s.stripes = std::min(most, blocks);
        s.fixed_offset = has_fixed_offset(s);
        s.offset = fixed_offset(s.scale);
        rows = allocate<float>(s.padded_n * s.padded_d);
        panel_data = allocate<float>(s.padded_n * s.padded_d);
        scale = allocate<float>(s.padded_n);
        s.x_rows = rows.get();
        s.x_panels = panel_data.get();
        s.row_scale = scale.get();
        parameter = padded(s.row_parameter, s.n, s.padded_n);
        s.parameter = parameter.data();
        for_each(parallel, panels(s.padded_n, kernels), 0,
                 [&](int64_t p, void*) { kernels.prepare_rows(s, p); });
    }
};

// Merges the stripes of row i: log of the sum of exponentials, in fp64 and rounded once; -inf where
// there is no negative.
float merged_lse(const Sweep& s, int64_t i) {
    float largest = s.stripe_max[i];
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n)
        largest = std::max(largest, s.stripe_max[at]);
    double total = 0;
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n)
        total += s.stripe_sum[at] * std::exp(double(s.stripe_max[at]) - largest);
    return total > 0 ? largest + std::log(total) : -std::numeric_limits<double>::infinity();
}

}  // namespace

void forward(Sweep s, const RowStatistics& out, const Parallel& parallel) {
    const Kernels& kernels = cpu_kernels(s.compute);
    const Prepared prepared(s, kernels, parallel);
    const int64_t size = s.stripes * s.padded_n;
    std::vector<float> largest(size), logit_max(s.want_max ? size : 0);
    std::vector<double> sum(size), logit_sum(s.want_sum ? size : 0);
    s.stripe_max = largest.data();
    s.stripe_sum = sum.data();
    s.stripe_logit_max = logit_max.data();
    s.stripe_logit_sum = logit_sum.data();
    for (int64_t i = 0; i < s.n; ++i)
        if (s.y[i] < 0) s.d_out[i] = s.w_norm[i] = 0;

    for_each(parallel, s.stripes, kernels.scratch_bytes(s, false),
             [&](int64_t stripe, void* scratch) { kernels.forward(s, stripe, scratch); });

    for (int64_t i = 0; i < s.n; ++i) {
        out.lse[i] = merged_lse(s, i);
        const bool none = std::isinf(out.lse[i]);
        if (s.want_max) {
            float best = -std::numeric_limits<float>::infinity();
            for (int64_t at = i; at < size && !none; at += s.padded_n)
                best = std::max(best, logit_max[at]);
            out.logit_max[i] = best;
        }
        if (s.want_sum) {
            double total = 0;
            for (int64_t at = i; at < size; at += s.padded_n) total += logit_sum[at];
            out.logit_sum[i] = total;
        }
    }
}

double backward(Sweep s, const RowGradients& rows, const Parallel& parallel) {
    const Kernels& kernels = cpu_kernels(s.compute);
    const Prepared prepared(s, kernels, parallel);
    const std::vector<float> a = padded(rows.a, s.n, s.padded_n);
    const std::vector<float> u = padded(rows.u, s.n, s.padded_n);
    const std::vector<float> lse = padded(rows.lse, s.n, s.padded_n);
    std::vector<float> weight(s.padded_n, 1.0F);
    if (s.tiles != nullptr)  // kept before lse and a were known: they weigh the rows instead
        for (int64_t i = 0; i < s.padded_n; ++i)
            weight[i] = std::isinf(lse[i]) ? 0 : a[i] * std::exp(double(s.offset) - lse[i]);
    s.a = a.data();
    s.u = rows.u == nullptr ? nullptr : u.data();
    s.lse = lse.data();
    s.row_weight = weight.data();
    std::vector<double> dscale(s.stripes, 0.0);
    s.stripe_dscale = dscale.data();

    const auto x_panels = allocate<float>(s.need_w ? s.padded_n * s.padded_d : 0);
    s.gradient_panels = x_panels.get();
    if (s.need_w)
        for_each(parallel, panels(s.padded_d, kernels), 0,
                 [&](int64_t p, void*) { kernels.prepare_gradient(s, p); });
    const auto dx_partial = allocate<float>(s.need_x ? s.stripes * s.n * s.padded_d : 0);
    s.dx_partial = dx_partial.get();

    for_each(parallel, s.stripes, kernels.scratch_bytes(s, true),
             [&](int64_t stripe, void* scratch) { kernels.backward(s, stripe, scratch); });

    constexpr int64_t kRows = 16;  // of dx, per task
    if (s.need_x)
        for_each(parallel, (s.n + kRows - 1) / kRows, 2 * s.padded_d * sizeof(float),
                 [&](int64_t task, void* scratch) {
                     const int64_t begin = task * kRows;
                     kernels.finish_dx(s, begin, std::min(begin + kRows, s.n), scratch);
                 });
    double total = 0;
    for (const double part : dscale) total += part;
    return total;
}

}  // namespace marginkernels
