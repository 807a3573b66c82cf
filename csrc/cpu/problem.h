// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The problem that the two sweeps work on, one struct for each phase of its life, and the table of
// kernels that each instruction set fills in.
//
// The classes are cut into stripes, one task each, and a stripe into blocks that stay in the cache.
// Each stripe has its own partial sums, which are merged in a fixed order: the number of stripes
// decides the bits of the result, the number of threads does not.
//
// Every instruction set includes this header before it chooses its own. Functions here are compiled
// for any processor, and formulas for vectors must not come in (see kernels.h).

#pragma once

#include <cstddef>
#include <cstdint>

#include "../numerics.h"
#include "../rule.h"
#include "../transform.h"

namespace marginkernels {

using mk::Transform;  // of the negatives' cosines

enum class Type { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(Type type) {
    return type == Type::kFloat32 ? 4 : 2;
}

struct Rows {
    const void* data;  // (count, D), the elements of a row next to each other
    int64_t stride;    // elements from one row to the next
    Type type;
};

struct WritableRows {
    void* data;
    int64_t stride;
    Type type;
};

inline float least_norm(Type compute) {
    return compute == Type::kFloat16 ? mk::kLeastNormFloat16 : mk::kLeastNorm;
}

// 1. The call: the arguments that the ops share. ops.cpp fills it in.
struct Call {
    Rows x;                // (N, D)
    Rows w;                // (C, D), or more rows with an index
    const int64_t* index;  // (C,) the rows of w that are swept, ascending, or null: all
    const int64_t* y;      // (N, targets) row among the swept ones, -1: none here
    int64_t targets;       // of a row, L in the shapes below
    int64_t centers;       // rows of w to a class
    const float* bias;     // (C,) or null
    float scale;
    bool normalize_x, normalize_w;
    Type compute;
    Transform transform;
    const float* row_parameter;  // (N,) or null
    float constants[mk::kMostConstants];
    int64_t n, c, d;
};

// 2. The plan: how the call is cut. schedule.cpp makes this and all that follows.
struct Plan {
    int64_t padded_n;       // N up to a multiple of mk::kTilePadding
    int64_t padded_d;       // D up to a multiple of the vector
    int64_t block_classes;  // rows of w: whole classes, and even
    int64_t stripes;
    bool one_versus_rest;  // instead of exponentials, softplus is summed
    bool fixed_offset;     // exp(z - offset) needs no running maximum
    float offset;
};

// 3. The operands: x as every block of classes reads it, and the inverse norms.
struct Operands {
    float* x_rows;           // (padded_n, padded_d) as rounded, zeros around
    float* x_panels;         // the same as operand of the logits
    float* x_inv;            // (N,) 1 / |x_i|, or 1
    float* row_scale;        // (padded_n,) r_i = scale x_inv_i
    const float* parameter;  // (padded_n,) row_parameter, zeros beyond it
    const float* w_inv;      // (C,) 1 / |w_j|
};

struct Problem : Call, Plan, Operands {};

// 4. Forward: its results, and the partial sums of the stripes.
struct ForwardSweep : Problem {
    float *target_cosine, *w_norm;  // (N, L)
    float* w_inv_out;               // (C,) the memory of w_inv, which forward fills in
    void* tiles;               // (C, padded_n) exp(z - offset) q_j in the compute type, or null
    float* stripe_max;         // (stripes, padded_n) largest logit, or the offset
    double* stripe_sum;        // (stripes, padded_n) sum of exp(z - maximum), or of softplus(z)
    float* stripe_logit_max;   // (stripes, padded_n), or null where it is not wanted
    double* stripe_logit_sum;  // (stripes, padded_n) of z or sigmoid(z), or null likewise
};

// 5. The update: what a step does to w with dw, which then goes nowhere else.
struct Update {
    mk::Rule rule;
    bool project;  // back to unit norm
    float numbers[mk::kUpdateNumbers];
    uint64_t seed;  // of the random bits, like the next two
    uint32_t step;
    int64_t first_class;  // the global class that row 0 of w is
    WritableRows w;
    WritableRows states[mk::kMostStates];  // like w, those that the rule has
    float* row_state;                      // one number per row of w, or null
    int64_t row_state_stride;
    float* w_inv;  // (C,) of the new rows; it may be the memory of the old ones
};

// 6. Backward: the gradients that arrive, then the results, each null where it is not wanted.
struct BackwardSweep : Problem {
    const float *a, *lse;      // (padded_n,) dL/dlse; lse
    const float* u;            // (padded_n,) dL/d(sum of logits), or null
    const float* grad_target;  // (N, L) dL/d(scale target_cosine)
    const float* grad_w_norm;  // (N, L) or null
    const void* tiles;         // what forward kept, or null
    // (padded_n,) a_i exp(offset - lse_i) with tiles, which lack this factor, or 1
    const float* row_weight;
    // row_weight_i r_i x_i as operand of dw; with tiles it is divided by the scale
    float* gradient_panels;

    // the targets' rows of w and their inverse norms as they are before the update, or null
    const char* target_rows;  // (N, L, D) in w's type
    const float* target_inv;  // (N, L)

    float* dx_partial;      // (stripes, N, padded_d)
    void* dx;               // (N, D) in x's type
    void* dw;               // like w, contiguous, in w's type
    const Update* update;   // or null
    float* dbias;           // (C,)
    double* stripe_dscale;  // (stripes,)

    bool needs_dw() const { return dw != nullptr || update != nullptr; }
};

struct Kernels {
    int64_t lanes;          // fp32 numbers per vector
    int64_t panel_rows;     // rows of x per panel: the unit of prepare_rows
    int64_t block_classes;  // at most, for small D
    // memory that a thread works in
    size_t (*scratch_bytes)(const Plan&, bool backward);
    // fills in one panel of rows of x: x_rows, x_panels, x_inv, row_scale
    void (*prepare_rows)(const Problem&, int64_t panel);
    // fills in one panel of features of gradient_panels
    void (*prepare_gradient)(const BackwardSweep&, int64_t panel);
    void (*forward_stripe)(const ForwardSweep&, int64_t stripe, void* scratch);
    void (*backward_stripe)(const BackwardSweep&, int64_t stripe, void* scratch);
    // adds up the stripes' parts of rows [begin, end) of dx
    void (*finish_dx)(const BackwardSweep&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace marginkernels
