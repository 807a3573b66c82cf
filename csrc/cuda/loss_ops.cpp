// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_held and head_loss: the work on N numbers before and after the sweep.

#include "../loss_arguments.h"
#include "operands.h"

namespace marginkernels::cuda {

Tensor head_held(const Tensor& y, int64_t first, int64_t count, int64_t ignore_index) {
    const c10::OptionalDeviceGuard guard(y.device());
    const Tensor labels = y.contiguous();
    Tensor held = at::empty_like(labels);
    launch_held(labels.const_data_ptr<int64_t>(), held.mutable_data_ptr<int64_t>(), labels.numel(),
                first, count, ignore_index, current_stream(y));
    return held;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_loss(
    const Tensor& lse, const Tensor& target_cosine, const Tensor& w_norm, const Tensor& y,
    const Tensor& scale, const OptionalTensor& sample_weight, const Tensor& logit_max,
    int64_t ignore_index, c10::string_view reduction, at::ArrayRef<double> rotation,
    bool need_scale) {
    const c10::OptionalDeviceGuard guard(lse.device());
    const LossArguments a(lse, target_cosine, w_norm, y, scale, sample_weight, logit_max, reduction,
                          rotation, need_scale);
    if (lse.scalar_type() == at::kDouble)
        launch_loss(a.call<double>(ignore_index), current_stream(lse));
    else
        launch_loss(a.call<float>(ignore_index), current_stream(lse));
    return a.results();
}

}  // namespace marginkernels::cuda
