// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// What the two sweeps work on, and the table of kernels that each instruction set fills in.
//
// The classes are cut into stripes, one task each, and a stripe into blocks that stay in the cache.
// A stripe has its own partial sums, merged in a fixed order: any number of threads gives the same
// bits as long as it gives the same stripes.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../numerics.h"
#include "../transform.h"

namespace marginkernels {

enum class Type { kFloat32, kBFloat16, kFloat16 };

struct Rows {
    const void* data;  // (count, D), the elements of a row next to each other
    int64_t stride;    // elements from one row to the next
    Type type;
};

using mk::Transform;  // of the negatives' cosines

inline float least_norm(Type compute) {
    return compute == Type::kFloat16 ? mk::kLeastNormFloat16 : mk::kLeastNorm;
}

struct Sweep {
    // the call
    Rows x;             // (N, D)
    Rows w;             // (C, D)
    const int64_t* y;   // (N,) class, -1: none here
    const float* bias;  // (C,) or null
    float scale;
    bool normalize_x, normalize_w;
    Type compute;
    Transform transform;
    const float* row_parameter;  // (N,) or null
    float constants[mk::kMostConstants];
    int64_t n, c, d;

    // how it is cut
    int64_t padded_n;       // multiple of mk::kTilePadding
    int64_t padded_d;       // multiple of the vector
    int64_t block_classes;  // even
    int64_t stripes;

    // what every class block needs of x; see prepare_rows
    float* x_inv;      // (N,) 1 / |x_i|, or 1
    float* x_rows;     // (padded_n, padded_d) as rounded, zeros around
    float* x_panels;   // operand of the logits
    float* row_scale;  // (padded_n,) r_i
    float* parameter;  // (padded_n,) row_parameter, zeros beyond it
    float* w_inv;      // (C,) 1 / |w_j|

    // exp(z - offset) needs no running maximum
    bool fixed_offset;
    float offset;
    void* tiles;  // (C, padded_n) exp(z - offset) q_j in the compute type, or null

    // forward
    float *d_out, *w_norm;  // (N,)
    bool want_sum, want_max;
    float* stripe_max;         // (stripes, padded_n) largest logit, or the offset
    double* stripe_sum;        // (stripes, padded_n) sum of exp(z - maximum)
    float* stripe_logit_max;   // (stripes, padded_n) where want_max
    double* stripe_logit_sum;  // (stripes, padded_n) where want_sum

    // backward
    bool need_x, need_w, need_bias, need_scale;
    const float *a, *u, *lse;  // (padded_n,) dL/dlse, dL/dS or null, lse
    const float* target;       // (N,) dL/d(s d)
    const float* grad_w_norm;  // (N,) or null
    const float* row_weight;  // (padded_n,) a_i exp(offset - lse_i) with tiles, which lack it, or 1
    float* gradient_panels;   // row_weight_i r_i x_i, with tiles over the scale: operand of dw
    float* dx_partial;        // (stripes, N, padded_d)
    void* dx;                 // (N, D) in x's type
    void* dw;                 // (C, D) in w's type
    float* dbias;             // (C,)
    double* stripe_dscale;    // (stripes,)
};

struct Kernels {
    int64_t lanes;          // fp32 numbers per vector
    int64_t panel_rows;     // rows of x per panel: the unit of prepare_rows
    int64_t block_classes;  // at most, for small D
    size_t (*scratch_bytes)(const Sweep&, bool backward);
    // one panel of rows: x_rows, x_inv, row_scale, x_panels
    void (*prepare_rows)(const Sweep&, int64_t panel);
    // one panel of features: gradient_panels
    void (*prepare_gradient)(const Sweep&, int64_t panel);
    void (*forward)(const Sweep&, int64_t stripe, void* scratch);
    void (*backward)(const Sweep&, int64_t stripe, void* scratch);
    // rows [begin, end) of dx from the stripes' partial sums
    void (*finish_dx)(const Sweep&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace marginkernels
