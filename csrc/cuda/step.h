// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// What head_step writes: w, the state of its rows and their norms.

#pragma once

#include <utility>
#include <vector>

#include "operands.h"

namespace marginkernels::cuda {

class Step {
  public:
    // All tensors are written, or read by the kernels when they run.
    Step(const Operands&, const Tensor& w, const Tensor& w_inv, at::TensorList state,
         const Tensor& numbers, const Tensor& random, c10::string_view rule, bool project,
         int64_t first_class);

    // Moves the classes from `first` on by their gradient. `sums` (count, width) are those that
    // `raw` names; the kernel uses their memory.
    void update(int64_t first, const RawGradient& raw, const Tensor& sums) const;

    // Returns the norms as the sweep reads them.
    const Tensor& w_inv() const { return w_inv_; }

    // Writes what is not contiguous back from its copy.
    void finish() const;

  private:
    const Operands& operands_;
    UpdateCall call_ = {};
    UpdateVariant variant_ = {};
    std::vector<std::pair<Tensor, Tensor>> written_;  // contiguous, original
    Tensor w_inv_, numbers_, random_;

    Tensor contiguous(const Tensor& t);
};

}  // namespace marginkernels::cuda
