// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The two sweeps from end to end on plain pointers: memory, threads, and the merging of stripes.

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

inline bool has_fixed_offset(const Call& call) {
    return call.normalize_x && call.normalize_w && call.bias == nullptr &&
           call.transform == Transform::kIdentity && call.scale < mk::kOffsetScaleLimit;
}

// Where forward's results go. marginkernels/ops.py says what each is.
struct ForwardResults {
    float* lse;                     // (N,)
    float *target_cosine, *w_norm;  // (N, L)
    float *logit_sum, *logit_max;   // (N,), or null where not wanted
    float *x_inv, *w_inv;           // (N,), (C,)
    bool w_inv_is_known;            // w_inv is filled in already
    void* tiles;                    // (C, N up to a multiple of mk::kTilePadding), or null
};

void sweep_forward(const Call& call, const ForwardResults& results, const Parallel& parallel);

// Results of forward that backward needs, and the gradients that arrive.
struct BackwardInputs {
    const float *lse, *w_inv;  // (N,), (C,)
    const void* tiles;         // as forward kept them, or null
    const float* grad_lse;     // (N,)
    const float* grad_target;  // (N, L)
    const float* grad_w_norm;  // (N, L) or null
    const float* grad_sum;     // (N,) or null
};

// Where backward's results go, each null where it is not wanted.
struct BackwardResults {
    void *dx, *dw;         // (N, D), (C, D) in the types of x and w
    float* dbias;          // (C,)
    double* dscale;        // ()
    const Update* update;  // what dw does to w
};

// All memory is there before the update, if there is one, writes anything.
void sweep_backward(const Call& call, const BackwardInputs& inputs, const BackwardResults& results,
                    const Parallel& parallel);

}  // namespace marginkernels
