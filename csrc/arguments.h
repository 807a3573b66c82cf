// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Checks of arguments that the ops of every device make.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "transforms.h"
#include "update.h"

namespace marginkernels {

inline void check_shapes(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y) {
    TORCH_CHECK_VALUE(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                      "w: expected (C, D) for x (N, D) = ", x.sizes(), ", got ", w.sizes());
    TORCH_CHECK_VALUE((y.dim() == 1 || y.dim() == 2) && y.size(0) == x.size(0),
                      "y: expected (N,) or (N, L) for x (N, D) = ", x.sizes(), ", got ", y.sizes());
}

// Returns how many targets a row has, of which some may be -1.
inline int64_t targets_per_row(const at::Tensor& y) {
    return y.dim() == 1 ? 1 : y.size(1);
}

// Checks a tensor with a number for each target.
inline void check_per_target(const std::optional<at::Tensor>& t, const char* name,
                             const at::Tensor& y) {
    TORCH_CHECK_VALUE(!t.has_value() || t->sizes() == y.sizes(), name, ": expected ", y.sizes(),
                      " like y, got ", t.has_value() ? t->sizes() : at::IntArrayRef());
}

// Checks that the swept rows of w make up whole classes.
inline void check_sub_centers(int64_t sub_centers, int64_t rows) {
    TORCH_CHECK_VALUE(sub_centers >= 1 && rows % sub_centers == 0,
                      "sub_centers: expected a divisor of the ", rows, " rows of w, got ",
                      sub_centers);
}

// Returns how many classes a sweep meets: the rows of w, or those that an index names.
inline int64_t checked_swept_classes(const at::Tensor& w, const std::optional<at::Tensor>& index) {
    if (!index.has_value()) return w.size(0);
    TORCH_CHECK_VALUE(index->dim() == 1 && index->scalar_type() == at::kLong,
                      "index: expected int64 (n,), got ", index->scalar_type(), " ",
                      index->sizes());
    return index->size(0);
}

// Checks a vector with a number for each swept class.
inline void check_per_class(const std::optional<at::Tensor>& t, const char* name, int64_t classes) {
    TORCH_CHECK_VALUE(!t.has_value() || (t->dim() == 1 && t->size(0) == classes), name,
                      ": expected one number for each of ", classes, " classes, got ",
                      t.has_value() ? t->sizes() : at::IntArrayRef());
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

// Checks the states of a rule that has this functor.
template <class Functor>
void check_state(at::TensorList state, const at::Tensor& w, at::ScalarType statistics) {
    for (int64_t i = 0; i < Functor::kStates; ++i) {
        const at::ScalarType type = state[i].scalar_type();
        TORCH_CHECK_VALUE(state[i].sizes() == w.sizes(), "state: expected ", w.sizes(),
                          " like w for the rule '", Functor::kName, "', got ", state[i].sizes());
        TORCH_CHECK_TYPE(type == statistics || (statistics == at::kFloat && type == at::kBFloat16),
                         "state: expected ", statistics,
                         statistics == at::kFloat ? " or BFloat16" : "", ", got ", type);
    }
    if constexpr (Functor::kHasRowState) {
        const at::Tensor& row = state[Functor::kStates];
        TORCH_CHECK_VALUE(row.dim() == 2 && row.size(0) == w.size(0) && row.size(1) == 1 &&
                              row.scalar_type() == statistics,
                          "state: expected (", w.size(0), ", 1) ", statistics, " for the rule '",
                          Functor::kName, "', got ", row.sizes(), " ", row.scalar_type());
    }
}

// Returns the rule of this name and with as many states, after checks of the operands of a step.
inline mk::Rule checked_rule(c10::string_view name, at::TensorList state, const at::Tensor& w,
                             const at::Tensor& numbers, const at::Tensor& random,
                             at::ScalarType statistics) {
    TORCH_CHECK_VALUE(numbers.dim() == 1 && numbers.size(0) == mk::kUpdateNumbers &&
                          numbers.scalar_type() == statistics,
                      "numbers: expected (", mk::kUpdateNumbers, ",) ", statistics, ", got ",
                      numbers.sizes(), " ", numbers.scalar_type());
    TORCH_CHECK_VALUE(random.dim() == 1 && random.size(0) == 2 && random.scalar_type() == at::kLong,
                      "random: expected int64 (2,), got ", random.sizes(), " ",
                      random.scalar_type());
    TORCH_CHECK_TYPE(w.scalar_type() == statistics ||
                         (statistics == at::kFloat && w.scalar_type() == at::kBFloat16),
                     "w: expected ", statistics, statistics == at::kFloat ? " or BFloat16" : "",
                     " for a step, got ", w.scalar_type());
    std::string names;
    std::optional<mk::Rule> found;
    mk::Rules::for_each([&](mk::Rule rule, auto functor) {
        using Functor = decltype(functor);
        constexpr size_t kStates = Functor::kStates + (Functor::kHasRowState ? 1 : 0);
        names += (names.empty() ? "'" : ", '") + std::string(Functor::kName) + "' with " +
                 std::to_string(kStates);
        if (name != Functor::kName || state.size() != kStates) return;
        check_state<Functor>(state, w, statistics);
        found = rule;
    });
    TORCH_CHECK_VALUE(found.has_value(), "rule: the native backend knows ", names,
                      " tensors of state, got '", name, "' with ", state.size());
    return *found;
}

}  // namespace marginkernels
