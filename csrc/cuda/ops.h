// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Declares the ops; marginkernels/ops.py and row_ops.py have their schemas and say what they
// compute.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace marginkernels::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_fwd(
    const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& scale,
    const OptionalTensor& bias, const OptionalTensor& index, const OptionalTensor& known_w_inv,
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool save_tiles,
    bool want_sum, bool want_max, c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants, bool keep_rounded, int64_t sub_centers);

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& scale,
    const OptionalTensor& bias, const OptionalTensor& index, const Tensor& lse, const Tensor& x_inv,
    const Tensor& w_inv, const Tensor& tiles, const Tensor& grad_lse, const Tensor& grad_target,
    const OptionalTensor& grad_w_norm, const OptionalTensor& grad_sum, bool normalize_x,
    bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w, bool need_bias,
    bool need_scale, c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants, const OptionalTensor& w_rounded, int64_t sub_centers);

std::tuple<Tensor, Tensor, Tensor> head_step(
    const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& scale,
    const OptionalTensor& bias, const OptionalTensor& index, const Tensor& lse, const Tensor& x_inv,
    const Tensor& w_inv, const Tensor& tiles, const Tensor& grad_lse, const Tensor& grad_target,
    const OptionalTensor& grad_w_norm, const OptionalTensor& grad_sum, at::TensorList state,
    const Tensor& numbers, const Tensor& random, bool normalize_x, bool normalize_w,
    at::ScalarType compute_dtype, bool need_x, bool need_bias, bool need_scale,
    c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants, c10::string_view rule, bool project, int64_t first_class,
    const OptionalTensor& w_rounded, int64_t sub_centers);

Tensor head_held(const Tensor& y, int64_t first, int64_t count, int64_t ignore_index);

std::tuple<Tensor, Tensor, Tensor, Tensor> head_loss(
    const Tensor& lse, const Tensor& target_cosine, const Tensor& w_norm, const Tensor& y,
    const Tensor& scale, const OptionalTensor& sample_weight, const Tensor& logit_max,
    int64_t ignore_index, c10::string_view reduction, at::ArrayRef<double> rotation,
    bool need_scale);

}  // namespace marginkernels::cuda
