// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// marginkernels::head_fwd_native, head_bwd_native and head_step_native for CPU tensors;
// marginkernels/ops.py has their schemas and says what they compute.

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

// Returns the rows of w that are swept, after a check that w has them.
OptionalTensor checked_index(const OptionalTensor& index, int64_t classes) {
    if (!index.has_value()) return index;
    const Tensor rows = index->contiguous();
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    for (int64_t j = 0; j < rows.size(0); ++j)
        TORCH_CHECK_VALUE(row[j] < classes && row[j] > (j > 0 ? row[j - 1] : -1),
                          "index: expected ascending rows of w, below ", classes, ", got ", row[j],
                          " at ", j);
    return rows;
}

// The arguments that all ops share, as tensors that kernels can read, and the call that points to
// them.
struct Arguments {
    Tensor x, w, y;
    OptionalTensor bias, index, row_parameter;
    Call call = {};

    Arguments(const Tensor& x_, const Tensor& w_, const Tensor& y_, const Tensor& scale,
              const OptionalTensor& bias_, const OptionalTensor& index_, bool normalize_x,
              bool normalize_w, at::ScalarType compute_dtype, c10::string_view transform,
              const OptionalTensor& row_parameter_, const OptionalTensor& constants,
              int64_t sub_centers)
        : x(with_dense_rows(x_)),
          w(with_dense_rows(w_)),
          y(y_.contiguous()),
          bias(contiguous(bias_)),
          row_parameter(contiguous(row_parameter_)) {
        check_shapes(x, w, y);
        call.c = checked_swept_classes(w, index_);
        check_sub_centers(sub_centers, call.c);
        check_per_class(bias, "bias", call.c);
        index = checked_index(index_, w.size(0));
        call.index = index.has_value() ? index->const_data_ptr<int64_t>() : nullptr;
        call.x = rows_of(x, "x");
        call.w = rows_of(w, "w");
        call.y = y.const_data_ptr<int64_t>();
        call.targets = targets_per_row(y);
        call.centers = sub_centers;
        call.bias = pointer(bias);
        call.scale = scale.item<float>();
        call.normalize_x = normalize_x;
        call.normalize_w = normalize_w;
        call.compute = type_of(compute_dtype, "compute_dtype");
        call.n = x.size(0);
        call.d = x.size(1);
        call.transform = checked_transform(transform, bias, row_parameter, constants, call.n);
        call.row_parameter = pointer(row_parameter);
        for (int64_t i = 0; constants.has_value() && i < constants->numel(); ++i)
            call.constants[i] = (*constants)[i].item<float>();
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_fwd(
    const Tensor& x,             // (N, D)
    const Tensor& w,             // (C, D)
    const Tensor& y,             // (N,) or (N, L)
    const Tensor& scale,         // ()
    const OptionalTensor& bias,  // (C,), as all that has a number per class
    const OptionalTensor& index, const OptionalTensor& known_w_inv, bool normalize_x,
    bool normalize_w, at::ScalarType compute_dtype, bool save_tiles, bool want_sum, bool want_max,
    c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants, bool keep_rounded, int64_t sub_centers) {
    TORCH_CHECK_VALUE(!keep_rounded, "keep_rounded: expected False on a CPU, got True");
    const Arguments arguments(x, w, y, scale, bias, index, normalize_x, normalize_w, compute_dtype,
                              transform, row_parameter, constants, sub_centers);
    const Call& call = arguments.call;
    TORCH_CHECK_VALUE(!save_tiles || (call.transform == Transform::kIdentity && call.targets == 1 &&
                                      sub_centers == 1),
                      "save_tiles: needs the identity, one target of a row and one centre of a "
                      "class, got '",
                      transform, "', ", call.targets, " and ", sub_centers);
    TORCH_CHECK_VALUE(!save_tiles || (has_fixed_offset(call) && call.compute != Type::kFloat16),
                      "save_tiles: needs both sides normalised, no bias, a scale below ",
                      mk::kOffsetScaleLimit, " and float32 or bfloat16, got scale ", call.scale,
                      " and ", compute_dtype);
    check_per_class(known_w_inv, "known_w_inv", call.c);
    const auto options = x.options().dtype(at::kFloat);
    const auto per_row = [&](bool wanted) { return at::empty({wanted ? call.n : 0}, options); };
    const Tensor lse = per_row(true), x_inv = per_row(true);
    const Tensor logit_sum = per_row(want_sum), logit_max = per_row(want_max);
    const Tensor target_cosine = at::empty(y.sizes(), options),
                 w_norm = at::empty_like(target_cosine);
    const Tensor w_inv = known_w_inv.has_value() ? known_w_inv->clone(at::MemoryFormat::Contiguous)
                                                 : at::empty({call.c}, options);
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
    results.w_inv_is_known = known_w_inv.has_value();
    results.tiles = save_tiles ? tiles.mutable_data_ptr() : nullptr;
    sweep_forward(call, results, at_parallel());
    return {lse,       target_cosine, w_norm,
            logit_sum, logit_max,     x_inv,
            w_inv,     tiles,         at::empty({0}, options.dtype(compute_dtype))};
}

// The arguments of a backward sweep, and what it returns but for dw.
struct Backward : Arguments {
    Tensor lse, w_inv, grad_lse, grad_target;
    OptionalTensor grad_w_norm, grad_sum;
    Tensor dx, dbias, dscale;
    BackwardInputs inputs = {};
    BackwardResults results = {};
    double scale_gradient = 0;

    Backward(Arguments arguments, const Tensor& lse_, const Tensor& w_inv_, const Tensor& tiles,
             const Tensor& grad_lse_, const Tensor& grad_target_,
             const OptionalTensor& grad_w_norm_, const OptionalTensor& grad_sum_, bool need_x,
             bool need_bias, bool need_scale)
        : Arguments(std::move(arguments)),
          lse(lse_.contiguous()),
          w_inv(w_inv_.contiguous()),
          grad_lse(grad_lse_.contiguous()),
          grad_target(grad_target_.contiguous()),
          grad_w_norm(contiguous(grad_w_norm_)),
          grad_sum(contiguous(grad_sum_)) {
        check_per_class(w_inv, "w_inv", call.c);
        check_per_target(grad_target, "grad_target", y);
        check_per_target(grad_w_norm, "grad_w_norm", y);
        const auto options = x.options().dtype(at::kFloat);
        dx = at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
        dbias = at::empty({need_bias ? call.c : 0}, options);
        dscale = need_scale ? at::zeros({}, options) : at::empty({0}, options);
        inputs.lse = lse.const_data_ptr<float>();
        inputs.w_inv = w_inv.const_data_ptr<float>();
        inputs.tiles = tiles.numel() > 0 ? tiles.const_data_ptr() : nullptr;
        inputs.grad_lse = grad_lse.const_data_ptr<float>();
        inputs.grad_target = grad_target.const_data_ptr<float>();
        inputs.grad_w_norm = pointer(grad_w_norm);
        inputs.grad_sum = pointer(grad_sum);
        results.dx = need_x ? dx.mutable_data_ptr() : nullptr;
        results.dbias = need_bias ? dbias.mutable_data_ptr<float>() : nullptr;
        results.dscale = need_scale ? &scale_gradient : nullptr;
    }

    void sweep() {
        float* const to = results.dscale == nullptr ? nullptr : dscale.mutable_data_ptr<float>();
        sweep_backward(call, inputs, results, at_parallel());
        if (to != nullptr) *to = scale_gradient;
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x,             // (N, D)
    const Tensor& w,             // (C, D)
    const Tensor& y,             // (N,) or (N, L)
    const Tensor& scale,         // ()
    const OptionalTensor& bias,  // (C,), as all that has a number per class
    const OptionalTensor& index,
    const Tensor& lse,  // (N,), as x_inv and the gradients of sums; the others are shaped as y
    const Tensor& x_inv, const Tensor& w_inv, const Tensor& tiles, const Tensor& grad_lse,
    const Tensor& grad_target, const OptionalTensor& grad_w_norm, const OptionalTensor& grad_sum,
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w,
    bool need_bias, bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter, const OptionalTensor& constants,
    const OptionalTensor& /*w_rounded*/, int64_t sub_centers) {
    Backward backward(Arguments(x, w, y, scale, bias, index, normalize_x, normalize_w,
                                compute_dtype, transform, row_parameter, constants, sub_centers),
                      lse, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum, need_x,
                      need_bias, need_scale);
    const Tensor dw = empty_in_huge_pages(need_w ? w.sizes() : at::IntArrayRef{0}, w.options());
    if (index.has_value()) dw.zero_();
    backward.results.dw = need_w ? dw.mutable_data_ptr() : nullptr;
    backward.sweep();
    return {backward.dx, dw, backward.dbias, backward.dscale};
}

WritableRows writable_rows_of(const Tensor& t, const char* name) {
    return {t.mutable_data_ptr(), t.stride(0), type_of(t.scalar_type(), name)};
}

// A step's update on tensors with dense rows: those of the call, or copies where theirs are not.
struct Step {
    Tensor w_inv;
    std::vector<Tensor> state;
    Update update = {};

    Step(const Tensor& w, const Tensor& w_inv_, at::TensorList state_, const Tensor& numbers,
         const Tensor& random, c10::string_view rule, bool project, int64_t first_class)
        : w_inv(w_inv_.contiguous()) {
        update.rule = checked_rule(rule, state_, w, numbers, random, at::kFloat);
        update.project = project;
        update.first_class = first_class;
        update.w = writable_rows_of(w, "w");
        update.w_inv = w_inv.mutable_data_ptr<float>();
        for (const Tensor& t : state_) state.push_back(with_dense_rows(t));
        mk::visit(update.rule, [&](auto functor) {
            for (int i = 0; i < functor.kStates; ++i)
                update.states[i] = writable_rows_of(state[i], "state");
            if (functor.kHasRowState) {
                update.row_state = state.back().mutable_data_ptr<float>();
                update.row_state_stride = state.back().stride(0);
            }
        });
        const Tensor dense_numbers = numbers.contiguous(), dense_random = random.contiguous();
        const float* const number = dense_numbers.const_data_ptr<float>();
        std::copy(number, number + mk::kUpdateNumbers, update.numbers);
        update.seed = dense_random.const_data_ptr<int64_t>()[0];
        update.step = dense_random.const_data_ptr<int64_t>()[1];
    }

    bool skipped() const { return update.numbers[mk::kSkip] != 0; }
};

// Writes a copy back to the tensor that it was made of.
void write_back(const Tensor& copy, const Tensor& original) {
    if (!copy.is_same(original)) original.copy_(copy);
}

std::tuple<Tensor, Tensor, Tensor> head_step(
    const Tensor& x,             // (N, D)
    const Tensor& w,             // (C, D)
    const Tensor& y,             // (N,) or (N, L)
    const Tensor& scale,         // ()
    const OptionalTensor& bias,  // (C,), as all that has a number per class
    const OptionalTensor& index,
    const Tensor& lse,  // (N,), as x_inv and the gradients of sums; the others are shaped as y
    const Tensor& x_inv, const Tensor& w_inv, const Tensor& tiles, const Tensor& grad_lse,
    const Tensor& grad_target, const OptionalTensor& grad_w_norm, const OptionalTensor& grad_sum,
    at::TensorList state, const Tensor& numbers, const Tensor& random, bool normalize_x,
    bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_bias, bool need_scale,
    c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants, c10::string_view rule, bool project, int64_t first_class,
    const OptionalTensor& /*w_rounded*/, int64_t sub_centers) {
    Backward backward(Arguments(x, w, y, scale, bias, index, normalize_x, normalize_w,
                                compute_dtype, transform, row_parameter, constants, sub_centers),
                      lse, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum, need_x,
                      need_bias, need_scale);
    const Step step(backward.w, w_inv, state, numbers, random, rule, project, first_class);
    backward.results.update = step.skipped() ? nullptr : &step.update;
    backward.sweep();
    if (!step.skipped()) {
        write_back(backward.w, w);
        write_back(step.w_inv, w_inv);
        for (size_t i = 0; i < state.size(); ++i) write_back(step.state[i], state[i]);
    }
    return {backward.dx, backward.dbias, backward.dscale};
}

TORCH_LIBRARY_IMPL(marginkernels, CPU, m) {
    m.impl("head_fwd_native", head_fwd);
    m.impl("head_bwd_native", head_bwd);
    m.impl("head_step_native", head_step);
}

}  // namespace
}  // namespace marginkernels
