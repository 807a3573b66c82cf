// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Sources of G, the gradient of the logits: they make it chunk by chunk, or have kept it.

#pragma once

#include <memory>
#include <vector>

#include "operands.h"

namespace marginkernels::cuda {

// Results of the forward sweep, and the gradients that arrive for them.
struct Incoming {
    Tensor lse, x_inv, w_inv, grad_lse;    // (N,), (N,), (C,), (N,)
    Tensor grad_target;                    // (pairs,)
    OptionalTensor grad_w_norm, grad_sum;  // (pairs,), (N,)
    bool need_bias, need_scale;
};

// A source of G. Some factors are still missing from what it returns; the results are multiplied
// with them.
class GradientSource {
  public:
    virtual ~GradientSource() = default;

    // Returns a chunk of G, (classes, N). `w_chunk` holds the classes' rows.
    virtual Tensor next(int64_t first, const Tensor& w_chunk) = 0;

    int64_t chunk_classes = 0;
    Tensor x;                             // (N, width): the other operand of dw
    Tensor row_weight;                    // (N,) of dx, or undefined
    OptionalTensor dx_factor, dw_factor;  // (N,) or (), ()
    std::vector<Tensor> dscales;          // () each, parts of a sum
};

// Returns the source for these operands. `tiles` are what the forward sweep saved, `slot` (c,) is
// that of target_kernel, `dbias` (c,) or (0,) takes the bias's gradient, and a chunk has
// `other_bytes` for each class beside G. All arguments have to outlive the source.
std::unique_ptr<GradientSource> gradient_source(Operands& operands, const Incoming& incoming,
                                                const Tensor& tiles, const Tensor& slot,
                                                const Tensor& dbias, int64_t other_bytes);

}  // namespace marginkernels::cuda
