// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The operands and the results of head_loss, as kernels of every device read and write them.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "loss.h"

namespace marginkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct LossArguments {
    Tensor lse, target_cosine, w_norm, y, scale, logit_max;
    OptionalTensor sample_weight;
    c10::string_view reduction;
    at::ArrayRef<double> rotation;
    bool need_scale;
    Tensor loss, slopes, row_loss, correct;

    LossArguments(const Tensor& lse_, const Tensor& target_cosine_, const Tensor& w_norm_,
                  const Tensor& y_, const Tensor& scale_, const OptionalTensor& sample_weight_,
                  const Tensor& logit_max_, c10::string_view reduction_,
                  at::ArrayRef<double> rotation_, bool need_scale_)
        : lse(lse_.contiguous()),
          target_cosine(target_cosine_.contiguous()),
          w_norm(w_norm_.contiguous()),
          y(y_.contiguous()),
          scale(scale_),
          logit_max(logit_max_.contiguous()),
          reduction(reduction_),
          rotation(rotation_),
          need_scale(need_scale_) {
        if (sample_weight_.has_value()) sample_weight = sample_weight_->contiguous();
        TORCH_CHECK_VALUE(rotation.size() == mk::kRotationNumbers, "rotation: expected ",
                          mk::kRotationNumbers, " numbers, got ", rotation.size());
        const int64_t n = y.numel(), stats = logit_max.numel();
        loss = at::empty(each() ? at::IntArrayRef(n) : at::IntArrayRef(), lse.options());
        slopes = at::empty({need_scale ? 3 : 2, n}, lse.options());
        row_loss = at::empty({stats}, lse.options());
        correct = at::empty({stats}, lse.options().dtype(at::kBool));
    }

    bool each() const { return reduction == "none"; }

    template <class A>
    mk::LossCall<A> call(int64_t ignore_index) const {
        const bool stats = logit_max.numel() > 0;
        mk::LossCall<A> c = {};
        c.lse = lse.const_data_ptr<A>();
        c.cosine = target_cosine.const_data_ptr<A>();
        c.w_norm = w_norm.const_data_ptr<A>();
        c.sample_weight = sample_weight.has_value() ? sample_weight->const_data_ptr<A>() : nullptr;
        c.logit_max = stats ? logit_max.const_data_ptr<A>() : nullptr;
        c.scale = scale.const_data_ptr<A>();
        c.y = y.const_data_ptr<int64_t>();
        c.loss = loss.mutable_data_ptr<A>();
        c.slopes = slopes.mutable_data_ptr<A>();
        c.row_loss = stats ? row_loss.mutable_data_ptr<A>() : nullptr;
        c.correct = stats ? correct.mutable_data_ptr<bool>() : nullptr;
        c.n = y.numel();
        c.ignore_index = ignore_index;
        c.mean = reduction == "mean";
        c.each = each();
        c.need_scale = need_scale;
        c.rotation = mk::rotation_of<A>(rotation.data());
        return c;
    }

    std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
        return {loss, slopes, row_loss, correct};
    }
};

}  // namespace marginkernels
