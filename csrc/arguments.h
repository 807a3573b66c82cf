// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// What the ops of every device check of their arguments.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "transforms.h"

namespace marginkernels {

inline void check_shapes(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y) {
    TORCH_CHECK_VALUE(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                      "w: expected (C, D) for x (N, D) = ", x.sizes(), ", got ", w.sizes());
    TORCH_CHECK_VALUE(y.dim() == 1 && y.size(0) == x.size(0),
                      "y: expected (N,) for x (N, D) = ", x.sizes(), ", got ", y.sizes());
}

// The transform of this name, after checks of its operands.
inline mk::Transform checked_transform(c10::string_view name, const std::optional<at::Tensor>& bias,
                                       const std::optional<at::Tensor>& row_parameter,
                                       const std::optional<at::Tensor>& constants, int64_t n) {
    std::string names;
    for (const mk::NamedTransform& known : mk::kTransforms) {
        names += (names.empty() ? "" : ", ") + std::string(known.name);
        if (name != known.name) continue;
        const int64_t given = constants.has_value() ? constants->numel() : 0;
        TORCH_CHECK_VALUE(given == known.constants, "constants: expected ", known.constants,
                          " for the transform '", name, "', got ", given);
        TORCH_CHECK_VALUE(known.transform == mk::Transform::kIdentity || !bias.has_value(),
                          "bias: expected none with the transform '", name, "'");
        TORCH_CHECK_VALUE(!row_parameter.has_value() || row_parameter->numel() == n,
                          "row_parameter: expected (N,) = ", n, ", got ",
                          row_parameter.has_value() ? row_parameter->sizes() : at::IntArrayRef());
        TORCH_CHECK_VALUE(row_parameter.has_value() || !known.per_row,
                          "row_parameter: expected (N,) for the transform '", name, "', got none");
        return known.transform;
    }
    TORCH_CHECK_VALUE(false, "transform: the native backend knows ", names, ", got '", name, "'");
}

}  // namespace marginkernels
