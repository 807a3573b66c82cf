// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "step.h"

#include "../arguments.h"

namespace marginkernels::cuda {

Step::Step(const Operands& operands, const Tensor& w, const Tensor& w_inv, at::TensorList state,
           const Tensor& numbers, const Tensor& random, c10::string_view rule, bool project,
           int64_t first_class)
    : operands_(operands),
      w_inv_(contiguous(w_inv)),
      numbers_(numbers.contiguous()),
      random_(random.contiguous()) {
    const bool fp64 = operands.type == Type::kFloat64;
    variant_ = {fp64, type_of(w.scalar_type(), "w"), Type::kFloat32,
                checked_rule(rule, state, w, numbers, random, fp64 ? at::kDouble : at::kFloat)};
    const Tensor rows = contiguous(w);
    call_.w = rows.mutable_data_ptr();
    call_.vectors = has_vectors(rows);
    mk::visit(variant_.rule, [&](auto functor) {
        using Functor = decltype(functor);
        for (int s = 0; s < Functor::kStates; ++s) {
            const Tensor of_weights = contiguous(state[s]);
            TORCH_CHECK_TYPE(of_weights.scalar_type() == state[0].scalar_type(),
                             "state: expected one type, got ", state[0].scalar_type(), " and ",
                             of_weights.scalar_type());
            variant_.state = type_of(of_weights.scalar_type(), "state");
            call_.state[s] = of_weights.mutable_data_ptr();
            call_.vectors = call_.vectors && has_vectors(of_weights);
        }
        if (Functor::kHasRowState)
            call_.row_state = contiguous(state[Functor::kStates]).mutable_data_ptr();
    });
    call_.numbers = numbers_.const_data_ptr();
    call_.random = random_.const_data_ptr<int64_t>();
    call_.first_class = first_class;
    call_.d = static_cast<int>(operands.d);
    call_.compute = operands.type;
    call_.project = project;
}

Tensor Step::contiguous(const Tensor& t) {
    written_.emplace_back(t.contiguous(), t);
    return written_.back().first;
}

void Step::update(int64_t first, const RawGradient& raw, const Tensor& sums) const {
    UpdateCall call = call_;
    call.raw = raw;
    call.sums = sums.mutable_data_ptr();
    call.w_inv = w_inv_.narrow(0, first, sums.size(0)).mutable_data_ptr();
    call.index = operands_.index_from(first);
    call.first = first;
    call.count = sums.size(0);
    launch_update(call, variant_, operands_.stream);
}

void Step::finish() const {
    for (const auto& [copy, original] : written_)
        if (!copy.is_same(original)) original.copy_(copy);
}

}  // namespace marginkernels::cuda
