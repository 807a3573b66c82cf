// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// marginkernels::head_held_native and head_loss_native for CPU tensors; marginkernels/row_ops.py
// has their schemas and says what they compute.

#include <torch/library.h>

#include "../loss_arguments.h"

namespace marginkernels {
namespace {

Tensor head_held(const Tensor& y, int64_t first, int64_t count, int64_t ignore_index) {
    const Tensor labels = y.contiguous();
    Tensor held = at::empty_like(labels);
    const int64_t* const label = labels.const_data_ptr<int64_t>();
    int64_t* const out = held.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i)
        out[i] = mk::held_class(label[i], first, count, ignore_index);
    return held;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_loss(
    const Tensor& lse, const Tensor& target_cosine, const Tensor& w_norm, const Tensor& y,
    const Tensor& scale, const OptionalTensor& sample_weight, const Tensor& logit_max,
    int64_t ignore_index, c10::string_view reduction, at::ArrayRef<double> rotation,
    bool need_scale) {
    const LossArguments a(lse, target_cosine, w_norm, y, scale, sample_weight, logit_max, reduction,
                          rotation, need_scale);
    const mk::LossCall<float> call = a.call<float>(ignore_index);
    double total = 0, sum = 0;
    for (int64_t i = 0; i < call.n; ++i) total += call.weight(i);
    const double share = call.mean && total > 0 ? 1 / total : 1;
    for (int64_t i = 0; i < call.n; ++i) sum += call.take(i, static_cast<float>(share));
    if (!call.each) *call.loss = static_cast<float>(sum * share);
    return a.results();
}

TORCH_LIBRARY_IMPL(marginkernels, CPU, m) {
    m.impl("head_held_native", head_held);
    m.impl("head_loss_native", head_loss);
}

}  // namespace
}  // namespace marginkernels
