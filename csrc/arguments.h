// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Checks of arguments that the ops of every device make.

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

// Checks the operands of a transform that has this functor.
template <class Functor>
void check_operands(mk::Transform transform, const std::optional<at::Tensor>& bias,
                    const std::optional<at::Tensor>& row_parameter,
                    const std::optional<at::Tensor>& constants, int64_t n) {
    const int64_t given = constants.has_value() ? constants->numel() : 0;
    TORCH_CHECK_VALUE(given == Functor::kConstants, "constants: expected ", Functor::kConstants,
                      " for the transform '", Functor::kName, "', got ", given);
    TORCH_CHECK_VALUE(transform == mk::Transform::kIdentity || !bias.has_value(),
                      "bias: expected none with the transform '", Functor::kName, "'");
    TORCH_CHECK_VALUE(!row_parameter.has_value() || row_parameter->numel() == n,
                      "row_parameter: expected (N,) = ", n, ", got ",
                      row_parameter.has_value() ? row_parameter->sizes() : at::IntArrayRef());
    TORCH_CHECK_VALUE(row_parameter.has_value() || !Functor::kPerRow,
                      "row_parameter: expected (N,) for the transform '", Functor::kName,
                      "', got none");
}

// Returns the transform of this name, after checks of its operands.
inline mk::Transform checked_transform(c10::string_view name, const std::optional<at::Tensor>& bias,
                                       const std::optional<at::Tensor>& row_parameter,
                                       const std::optional<at::Tensor>& constants, int64_t n) {
    std::string names;
    std::optional<mk::Transform> found;
    mk::Transforms::for_each([&](mk::Transform transform, auto functor) {
        using Functor = decltype(functor);
        names += (names.empty() ? "" : ", ") + std::string(Functor::kName);
        if (name != Functor::kName) return;
        check_operands<Functor>(transform, bias, row_parameter, constants, n);
        found = transform;
    });
    TORCH_CHECK_VALUE(found.has_value(), "transform: the native backend knows ", names, ", got '",
                      name, "'");
    return *found;
}

}  // namespace marginkernels
