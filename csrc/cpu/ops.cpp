// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// marginkernels::head_fwd_native and head_bwd_native for CPU tensors; marginkernels/ops.py has
// their schemas and says what they compute.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../arguments.h"
#include "schedule.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace marginkernels {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(at::ScalarType type, const char* name) {
    switch (type) {
        case at::kFloat: return Type::kFloat32;
        case at::kBFloat16: return Type::kBFloat16;
        case at::kHalf: return Type::kFloat16;
        default:
            TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16 or float16, got ", type);
    }
}

// Returns (count, D) with the numbers of a row next to each other, as a copy where they are not.
Tensor with_dense_rows(const Tensor& t) {
    return t.stride(1) == 1 || t.size(1) == 1 ? t : t.contiguous();
}

Rows rows_of(const Tensor& t, const char* name) {
    return {t.const_data_ptr(), t.stride(0), type_of(t.scalar_type(), name)};
}

const float* pointer(const OptionalTensor& t) {
    return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(t->contiguous()) : t;
}

// Returns a new tensor whose first touch, inside the sweep, faults in 2 MiB at a time where Linux
// lets it. Faults of 4 KiB pages cost as much as a third of the sweep.
Tensor empty_in_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor t = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kHugePage = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + t.nbytes()) / kHugePage * kHugePage;
    // a hint: where it is refused, pages stay small
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return t;
}

// Runs a function on every thread of ATen's pool.
Parallel at_parallel() {
    const int threads = at::get_num_threads();
    return {threads, [threads](const std::function<void()>& f) {
                at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) f();
                });
            }};
}

// The arguments that both ops share, as tensors that kernels can read, and the call that points to
// them.
struct Arguments {
    Tensor x, w, y;
    OptionalTensor bias, row_parameter;
    Call call = {};

    Arguments(const Tensor& x_, const Tensor& w_, const Tensor& y_, const Tensor& scale,
              const OptionalTensor& bias_, bool normalize_x, bool normalize_w,
              at::ScalarType compute_dtype, c10::string_view transform,
              const OptionalTensor& row_parameter_, const OptionalTensor& constants)
        : x(with_dense_rows(x_)),
          w(with_dense_rows(w_)),
          y(y_.contiguous()),
          bias(contiguous(bias_)),
          row_parameter(contiguous(row_parameter_)) {
        check_shapes(x, w, y);
        call.x = rows_of(x, "x");
        call.w = rows_of(w, "w");
        call.y = y.const_data_ptr<int64_t>();
        call.bias = pointer(bias);
        call.scale = scale.item<float>();
        call.normalize_x = normalize_x;
        call.normalize_w = normalize_w;
        call.compute = type_of(compute_dtype, "compute_dtype");
        call.n = x.size(0);
        call.c = w.size(0);
        call.d = x.size(1);
        call.transform = checked_transform(transform, bias, row_parameter, constants, call.n);
        call.row_parameter = pointer(row_parameter);
        for (int64_t i = 0; constants.has_value() && i < constants->numel(); ++i)
            call.constants[i] = (*constants)[i].item<float>();
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_fwd(
    const Tensor& x,              // (N, D)
    const Tensor& w,              // (C, D)
    const Tensor& y,              // (N,)
    const Tensor& scale,          // ()
    const OptionalTensor& bias,   // (C,)
    const OptionalTensor& index,  // (C,) rows of w
    const OptionalTensor&, bool normalize_x, bool normalize_w, at::ScalarType compute_dtype,
    bool save_tiles, bool want_sum, bool want_max, c10::string_view transform,
    const OptionalTensor& row_parameter, const OptionalTensor& constants) {
    const Arguments arguments(x, index.has_value() ? w.index_select(0, *index) : w, y, scale, bias,
                              normalize_x, normalize_w, compute_dtype, transform, row_parameter,
                              constants);
    const Call& call = arguments.call;
    TORCH_CHECK_VALUE(!save_tiles || (has_fixed_offset(call) && call.compute != Type::kFloat16),
                      "save_tiles: needs both sides normalised, no bias, a scale below ",
                      mk::kOffsetScaleLimit, " and float32 or bfloat16, got scale ", call.scale,
                      " and ", compute_dtype);
    const auto options = x.options().dtype(at::kFloat);
    const auto per_row = [&](bool wanted) { return at::empty({wanted ? call.n : 0}, options); };
    const Tensor lse = per_row(true), target_cosine = per_row(true), w_norm = per_row(true);
    const Tensor logit_sum = per_row(want_sum), logit_max = per_row(want_max);
    const Tensor x_inv = per_row(true), w_inv = at::empty({call.c}, options);
    const Tensor tiles = save_tiles
                             ? empty_in_huge_pages({call.c, round_up_to(call.n, mk::kTilePadding)},
                                                   options.dtype(compute_dtype))
                             : at::empty({0}, options);
    ForwardResults results = {};
    results.lse = lse.mutable_data_ptr<float>();
    results.target_cosine = target_cosine.mutable_data_ptr<float>();
    results.w_norm = w_norm.mutable_data_ptr<float>();
    results.logit_sum = want_sum ? logit_sum.mutable_data_ptr<float>() : nullptr;
    results.logit_max = want_max ? logit_max.mutable_data_ptr<float>() : nullptr;
    results.x_inv = x_inv.mutable_data_ptr<float>();
    results.w_inv = w_inv.mutable_data_ptr<float>();
    results.tiles = save_tiles ? tiles.mutable_data_ptr() : nullptr;
    sweep_forward(call, results, at_parallel());
    return {lse, target_cosine, w_norm, logit_sum, logit_max, x_inv, w_inv, tiles};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x,              // (N, D)
    const Tensor& w,              // (C, D)
    const Tensor& y,              // (N,)
    const Tensor& scale,          // ()
    const OptionalTensor& bias,   // (C,)
    const OptionalTensor& index,  // (C,) rows of w
    const Tensor& lse_,           // (N,)
    const Tensor& x_inv, const Tensor& w_inv_, const Tensor& tiles,
    const Tensor& grad_lse_,     // (N,)
    const Tensor& grad_target_,  // (N,)
    const OptionalTensor& grad_w_norm_, const OptionalTensor& grad_sum_, bool normalize_x,
    bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w, bool need_bias,
    bool need_scale, c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants) {
    if (index.has_value()) {
        auto gradients =
            head_bwd(x, w.index_select(0, *index), y, scale, bias, std::nullopt, lse_, x_inv,
                     w_inv_, tiles, grad_lse_, grad_target_, grad_w_norm_, grad_sum_, normalize_x,
                     normalize_w, compute_dtype, need_x, need_w, need_bias, need_scale, transform,
                     row_parameter, constants);
        auto& dw = std::get<1>(gradients);
        if (need_w) dw = at::zeros_like(w).index_copy_(0, *index, dw);
        return gradients;
    }
    const Arguments arguments(x, w, y, scale, bias, normalize_x, normalize_w, compute_dtype,
                              transform, row_parameter, constants);
    const Call& call = arguments.call;
    const Tensor lse = lse_.contiguous(), w_inv = w_inv_.contiguous();
    const Tensor grad_lse = grad_lse_.contiguous(), grad_target = grad_target_.contiguous();
    const OptionalTensor grad_w_norm = contiguous(grad_w_norm_), grad_sum = contiguous(grad_sum_);
    const auto options = x.options().dtype(at::kFloat);
    const Tensor dx = at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
    const Tensor dw = empty_in_huge_pages(need_w ? w.sizes() : at::IntArrayRef{0}, w.options());
    const Tensor dbias = at::empty({need_bias ? call.c : 0}, options);
    const Tensor dscale = need_scale ? at::zeros({}, options) : at::empty({0}, options);
    if (call.n == 0) return {dx, dw.zero_(), dbias.zero_(), dscale};
    BackwardInputs inputs = {};
    inputs.lse = lse.const_data_ptr<float>();
    inputs.w_inv = w_inv.const_data_ptr<float>();
    inputs.tiles = tiles.numel() > 0 ? tiles.const_data_ptr() : nullptr;
    inputs.grad_lse = grad_lse.const_data_ptr<float>();
    inputs.grad_target = grad_target.const_data_ptr<float>();
    inputs.grad_w_norm = pointer(grad_w_norm);
    inputs.grad_sum = pointer(grad_sum);
    double scale_gradient = 0;
    BackwardResults results = {};
    results.dx = need_x ? dx.mutable_data_ptr() : nullptr;
    results.dw = need_w ? dw.mutable_data_ptr() : nullptr;
    results.dbias = need_bias ? dbias.mutable_data_ptr<float>() : nullptr;
    results.dscale = need_scale ? &scale_gradient : nullptr;
    sweep_backward(call, inputs, results, at_parallel());
    if (need_scale) dscale.fill_(scale_gradient);
    return {dx, dw, dbias, dscale};
}

TORCH_LIBRARY_IMPL(marginkernels, CPU, m) {
    m.impl("head_fwd_native", head_fwd);
    m.impl("head_bwd_native", head_bwd);
}

}  // namespace
}  // namespace marginkernels
