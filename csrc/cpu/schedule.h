// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The two sweeps from end to end on plain pointers: memory, threads, and what joins the stripes.

#pragma once

#include <functional>

#include "problem.h"

namespace marginkernels {

struct Parallel {
    int threads;
    // calls the function on each of the threads, and returns when all are done
    std::function<void(const std::function<void()>&)> run;
};

constexpr int64_t round_up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline float fixed_offset(float scale) {
    return scale > mk::kOffsetStart ? scale - mk::kOffsetStart : 0.0F;
}

inline bool has_fixed_offset(const Sweep& s) {
    return s.normalize_x && s.normalize_w && s.bias == nullptr &&
           s.transform == Transform::kIdentity && s.scale < mk::kOffsetScaleLimit;
}

// (N,) each; the last two where wanted. They and marginkernels/ops.py say what they are.
struct RowStatistics {
    float *lse, *logit_sum, *logit_max;
};

// ``s`` has the call, x_inv, w_inv, tiles, d_out, w_norm, want_*; the rest is set here.
void forward(Sweep s, const RowStatistics& out, const Parallel& parallel);

// (N,) each, u and grad_w_norm or null.
struct RowGradients {
    const float *lse, *a, *u;
};

// ``s`` has the call, x_inv, w_inv, tiles, target, grad_w_norm, need_*, dx, dw, dbias. Returns
// dscale.
double backward(Sweep s, const RowGradients& rows, const Parallel& parallel);

}  // namespace marginkernels
