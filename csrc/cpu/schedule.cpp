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
#include <numeric>
#include <vector>

#include "../transforms.h"
#include "dispatch.h"

namespace marginkernels {
namespace {

constexpr int64_t kStripes = 16;
// partial sums of dx may take this much, and always one stripe per thread
constexpr int64_t kPartialBytes = 32 << 20;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Memory = std::unique_ptr<T[], Free>;

// Returns uninitialised memory, aligned to a cache line.
template <class T>
Memory<T> allocate(int64_t count) {
    const size_t bytes = round_up_to(std::max<int64_t>(count, 1) * sizeof(T), 64);
    void* const p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return Memory<T>(static_cast<T*>(p));
}

// The threads of a sweep, and the memory that each works in.
class Workers {
  public:
    Workers(const Parallel& parallel, size_t scratch_bytes) : parallel_(parallel) {
        for (int i = 0; i < parallel.threads; ++i)
            scratch_.push_back(allocate<char>(scratch_bytes));
    }

    // Calls f(index, scratch) for all indices, which go to whichever thread is free. Allocates
    // nothing.
    template <class F>
    void for_each(int64_t count, const F& f) const {
        std::atomic<int64_t> next_worker{0}, next{0};
        const auto work = [&] {
            char* const scratch = scratch_[next_worker++].get();
            for (int64_t i = next++; i < count; i = next++) f(i, scratch);
        };
        parallel_.run(std::ref(work));
    }

  private:
    const Parallel& parallel_;
    std::vector<Memory<char>> scratch_;
};

int64_t panels(int64_t columns, const Kernels& kernels) {
    return (columns + kernels.panel_rows - 1) / kernels.panel_rows;
}

// Returns how many rows of w are in a block: fewer where they are long, so that a block stays in
// the cache. It is an even multiple of the centres of a class, and of the micro-kernel's rows too
// where such a multiple fits.
int64_t classes_per_block(int64_t padded_d, int64_t centers, const Kernels& kernels) {
    constexpr int64_t kRowOfFullBlock = 512, kStep = 6;
    const int64_t fitting = std::clamp(kernels.block_classes * kRowOfFullBlock / padded_d,
                                       4 * kStep, kernels.block_classes);
    int64_t unit = std::lcm(centers, kStep);
    if (unit > fitting) unit = std::lcm(centers, 2);
    return std::max(fitting / unit * unit, unit);
}

bool is_one_versus_rest(Transform transform) {
    bool found = false;
    mk::visit(transform, [&](auto functor) { found = functor.kOneVersusRest; });
    return found;
}

Plan plan_of(const Call& call, const Kernels& kernels, int threads) {
    Plan plan = {};
    plan.padded_n = round_up_to(call.n, mk::kTilePadding);
    plan.padded_d = round_up_to(call.d, kernels.lanes);
    plan.block_classes = classes_per_block(plan.padded_d, call.centers, kernels);
    const int64_t blocks = (call.c + plan.block_classes - 1) / plan.block_classes;
    const int64_t bytes = std::max<int64_t>(1, call.n * plan.padded_d * sizeof(float));
    const int64_t most =
        std::clamp<int64_t>(kPartialBytes / bytes, threads, std::max<int64_t>(kStripes, threads));
    plan.stripes = std::min(most, blocks);
    plan.one_versus_rest = is_one_versus_rest(call.transform);
    plan.fixed_offset = has_fixed_offset(call);
    plan.offset = fixed_offset(call.scale);
    return plan;
}

// Returns a copy with zeros up to the padded length; zeros alone for null.
std::vector<float> padded(const float* values, int64_t n, int64_t padded_n) {
    std::vector<float> copy(padded_n, 0.0F);
    if (values != nullptr) std::copy(values, values + n, copy.begin());
    return copy;
}

// Owns the operands that are made of x.
struct PreparedRows {
    Memory<float> rows, panel_data, scale;
    std::vector<float> parameter;

    // Fills in the operands but for w_inv.
    PreparedRows(Problem& problem, float* x_inv, const Kernels& kernels, const Workers& workers) {
        rows = allocate<float>(problem.padded_n * problem.padded_d);
        panel_data = allocate<float>(problem.padded_n * problem.padded_d);
        scale = allocate<float>(problem.padded_n);
        parameter = padded(problem.row_parameter, problem.n, problem.padded_n);
        problem.x_rows = rows.get();
        problem.x_panels = panel_data.get();
        problem.x_inv = x_inv;
        problem.row_scale = scale.get();
        problem.parameter = parameter.data();
        workers.for_each(panels(problem.padded_n, kernels),
                         [&](int64_t panel, void*) { kernels.prepare_rows(problem, panel); });
    }
};

// Returns the sum of row i over the stripes.
double merged_sum(const ForwardSweep& s, const double* stripe_sum, int64_t i) {
    double total = 0;
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n) total += stripe_sum[at];
    return total;
}

// Returns the log of row i's sum of exponentials, added up over the stripes in fp64 and rounded
// once; -inf where there is no negative.
float merged_lse(const ForwardSweep& s, int64_t i) {
    float largest = s.stripe_max[i];
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n)
        largest = std::max(largest, s.stripe_max[at]);
    double total = 0;
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n)
        total += s.stripe_sum[at] * std::exp(double(s.stripe_max[at]) - largest);
    return total > 0 ? largest + std::log(total) : -std::numeric_limits<double>::infinity();
}

// Returns the largest logit of row i; -inf where there is no negative.
float merged_maximum(const ForwardSweep& s, int64_t i) {
    float best = mk::kNoMaximum;
    for (int64_t at = i; at < s.stripes * s.padded_n; at += s.padded_n)
        best = std::max(best, s.stripe_logit_max[at]);
    return best > mk::kNoMaximum ? best : -std::numeric_limits<float>::infinity();
}

void merge_stripes(const ForwardSweep& s, const ForwardResults& results) {
    for (int64_t i = 0; i < s.n; ++i) {
        results.lse[i] = s.one_versus_rest ? merged_sum(s, s.stripe_sum, i) : merged_lse(s, i);
        if (results.logit_max != nullptr) results.logit_max[i] = merged_maximum(s, i);
        if (results.logit_sum != nullptr)
            results.logit_sum[i] = merged_sum(s, s.stripe_logit_sum, i);
    }
}

// Returns row_weight: saved exponentials were made before lse and a were known, so that these weigh
// the rows of x instead.
std::vector<float> row_weights(const BackwardSweep& s) {
    std::vector<float> weights(s.padded_n, 1.0F);
    if (s.tiles != nullptr)
        for (int64_t i = 0; i < s.padded_n; ++i)
            weights[i] = std::isinf(s.lse[i]) ? 0 : s.a[i] * std::exp(double(s.offset) - s.lse[i]);
    return weights;
}

void finish_all_rows(const BackwardSweep& s, const Kernels& kernels, const Workers& workers) {
    constexpr int64_t kRowsPerTask = 16;
    workers.for_each((s.n + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, void* scratch) {
        const int64_t begin = task * kRowsPerTask;
        kernels.finish_dx(s, begin, std::min(begin + kRowsPerTask, s.n), scratch);
    });
}

// Owns copies of the targets' rows of w and of their inverse norms, which an update changes.
struct TargetRows {
    Memory<char> rows;
    Memory<float> inverse;

    explicit TargetRows(BackwardSweep& s) {
        if (s.update == nullptr || s.dx == nullptr) return;
        const int64_t row_bytes = s.d * size_of(s.w.type), stride = s.w.stride * size_of(s.w.type);
        const int64_t count = s.n * s.targets;
        rows = allocate<char>(count * row_bytes);
        inverse = allocate<float>(count);
        for (int64_t t = 0; t < count; ++t) {
            if (s.y[t] < 0) continue;
            const int64_t row = s.index == nullptr ? s.y[t] : s.index[s.y[t]];
            const char* from = static_cast<const char*>(s.w.data) + row * stride;
            std::copy(from, from + row_bytes, rows.get() + t * row_bytes);
            inverse[t] = s.w_inv[s.y[t]];
        }
        s.target_rows = rows.get();
        s.target_inv = inverse.get();
    }
};

}  // namespace

void sweep_forward(const Call& call, const ForwardResults& results, const Parallel& parallel) {
    const Kernels& kernels = cpu_kernels(call.compute);
    ForwardSweep s = {};
    static_cast<Call&>(s) = call;
    static_cast<Plan&>(s) = plan_of(call, kernels, parallel.threads);
    const Workers workers(parallel, kernels.scratch_bytes(s, false));
    const PreparedRows prepared(s, results.x_inv, kernels, workers);
    const int64_t size = s.stripes * s.padded_n;
    std::vector<float> largest(size), logit_max(results.logit_max != nullptr ? size : 0);
    std::vector<double> sum(size), logit_sum(results.logit_sum != nullptr ? size : 0);
    s.w_inv = results.w_inv;
    s.w_inv_out = results.w_inv_is_known ? nullptr : results.w_inv;
    s.tiles = results.tiles;
    s.target_cosine = results.target_cosine;
    s.w_norm = results.w_norm;
    s.stripe_max = largest.data();
    s.stripe_sum = sum.data();
    s.stripe_logit_max = logit_max.empty() ? nullptr : logit_max.data();
    s.stripe_logit_sum = logit_sum.empty() ? nullptr : logit_sum.data();
    for (int64_t t = 0; t < s.n * s.targets; ++t)
        if (s.y[t] < 0) s.target_cosine[t] = s.w_norm[t] = 0;

    workers.for_each(s.stripes, [&](int64_t stripe, void* scratch) {
        kernels.forward_stripe(s, stripe, scratch);
    });
    merge_stripes(s, results);
}

void sweep_backward(const Call& call, const BackwardInputs& inputs, const BackwardResults& results,
                    const Parallel& parallel) {
    const Kernels& kernels = cpu_kernels(call.compute);
    BackwardSweep s = {};
    static_cast<Call&>(s) = call;
    static_cast<Plan&>(s) = plan_of(call, kernels, parallel.threads);
    const size_t rows_bytes = 2 * s.padded_d * sizeof(float);  // what finish_dx works in
    const Workers workers(parallel, std::max(kernels.scratch_bytes(s, true), rows_bytes));
    const auto x_inv = allocate<float>(call.n);  // preparing the rows measures them again
    const PreparedRows prepared(s, x_inv.get(), kernels, workers);
    const std::vector<float> a = padded(inputs.grad_lse, s.n, s.padded_n);
    const std::vector<float> u = padded(inputs.grad_sum, s.n, s.padded_n);
    const std::vector<float> lse = padded(inputs.lse, s.n, s.padded_n);
    s.w_inv = inputs.w_inv;
    s.tiles = inputs.tiles;
    s.a = a.data();
    s.u = inputs.grad_sum == nullptr ? nullptr : u.data();
    s.lse = lse.data();
    s.grad_target = inputs.grad_target;
    s.grad_w_norm = inputs.grad_w_norm;
    s.dx = results.dx;
    s.dw = results.dw;
    s.update = results.update;
    s.dbias = results.dbias;
    const std::vector<float> weights = row_weights(s);
    s.row_weight = weights.data();
    std::vector<double> dscale(s.stripes, 0.0);
    s.stripe_dscale = results.dscale == nullptr ? nullptr : dscale.data();

    const auto gradient_panels = allocate<float>(s.needs_dw() ? s.padded_n * s.padded_d : 0);
    s.gradient_panels = gradient_panels.get();
    if (s.needs_dw())
        workers.for_each(panels(s.padded_d, kernels),
                         [&](int64_t panel, void*) { kernels.prepare_gradient(s, panel); });
    const TargetRows targets(s);
    const auto partial = allocate<float>(s.dx != nullptr ? s.stripes * s.n * s.padded_d : 0);
    s.dx_partial = partial.get();

    workers.for_each(s.stripes, [&](int64_t stripe, void* scratch) {
        kernels.backward_stripe(s, stripe, scratch);
    });
    if (s.dx != nullptr) finish_all_rows(s, kernels, workers);
    if (results.dscale != nullptr) {
        *results.dscale = 0;
        for (const double part : dscale) *results.dscale += part;
    }
}

}  // namespace marginkernels
