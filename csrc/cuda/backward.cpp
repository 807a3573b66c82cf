// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_bwd and head_step: take G chunk by chunk from a source, and hand it to the GEMMs that make
// dx and dw. head_bwd stores dw; head_step moves w and its state by it.

#include "../arguments.h"
#include "sources.h"
#include "step.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// The targets' columns of G, see target_kernel.
struct Targets {
    Tensor dx, slot, sums;
    OptionalTensor radial;

    Targets(const Operands& operands, const Incoming& incoming)
        : dx(operands.statistics({operands.pairs(), operands.width})),
          slot(operands.empty({operands.c}, at::kInt)),
          sums(operands.statistics({operands.pairs(), operands.width})) {
        if (incoming.grad_w_norm.has_value()) radial = operands.statistics({operands.pairs()});
        Tensor sorted, order;
        TargetCall call = {};
        if (operands.pairs() > kMostScannedPairs) {
            std::tie(sorted, order) = at::sort(operands.y, std::optional<bool>(true),
                                               /*dim=*/0, /*descending=*/false);
            call.sorted = sorted.const_data_ptr<int64_t>();
            call.order = order.const_data_ptr<int64_t>();
        }
        call.x = operands.x.const_data_ptr();
        call.w = operands.stored_w();
        call.y = operands.y.const_data_ptr<int64_t>();
        call.x_inv = incoming.x_inv.const_data_ptr();
        call.w_inv = incoming.w_inv.const_data_ptr();
        call.scale = operands.scale.const_data_ptr();
        call.grad_target = incoming.grad_target.const_data_ptr();
        call.grad_w_norm = pointer(incoming.grad_w_norm);
        call.dx = dx.mutable_data_ptr();
        call.slot = slot.mutable_data_ptr<int>();
        call.sums = sums.mutable_data_ptr();
        call.radial = radial.has_value() ? radial->mutable_data_ptr() : nullptr;
        call.pairs = static_cast<int>(operands.pairs());
        call.n = static_cast<int>(operands.n);
        call.width = static_cast<int>(operands.width);
        call.normalize_w = operands.normalize_w;
        launch_target(call, operands.type, operands.stream);
        if (operands.targets > 1)
            dx = dx.view({operands.targets, operands.n, operands.width}).sum(0);
    }
};

// Rows of dw along unit rows, as a GEMM left them.
struct RawRows {
    int64_t first;  // class
    Tensor rows;    // (count, width) of w
    Tensor sums;    // (count, width)
    RawGradient raw;

    int64_t count() const { return rows.size(0); }
};

// Results of the backward ops.
struct Gradients {
    Tensor dx, dbias, dscale;

    Gradients(const Operands& operands, const Tensor& x, const Incoming& incoming, bool need_x)
        : dx(at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options())),
          dbias(operands.statistics({incoming.need_bias ? operands.c : 0})),
          dscale(incoming.need_scale ? operands.statistics({}).zero_() : operands.statistics({0})) {
    }
};

// The sweep over all chunks of G.
class Sweep {
  public:
    // `in_place` (c, width), where it is defined, takes dw before its projection.
    Sweep(Operands& operands, const Incoming& incoming, const Tensor& tiles, const Tensor& dbias,
          bool need_w, const Tensor& in_place)
        : operands_(operands),
          incoming_(incoming),
          in_place_(in_place),
          need_w_(need_w),
          targets_(operands, incoming),
          source_(gradient_source(operands, incoming, tiles, targets_.slot, dbias,
                                  need_w && !in_place.defined() ? dw_bytes() : 0)) {}

    // Writes dx and dscale where they are not empty. Calls take(raw rows) for dw chunk by chunk,
    // only after the chunk of w has given its share to dx.
    template <class Take>
    void run(const Gradients& gradients, bool normalize_x, Take&& take) {
        Tensor dx_sums, buffer;
        const bool need_x = gradients.dx.numel() > 0;
        if (need_x) dx_sums = operands_.statistics({operands_.n, operands_.width});
        if (need_x && operands_.c == 0) dx_sums.zero_();
        const auto step = [&](int64_t first, const Tensor& w_chunk) {
            const Tensor g = source_->next(first, w_chunk);
            if (need_x) (first == 0 ? mm : add_mm)(dx_sums, g.t(), w_chunk);
            if (need_w_) take(raw_rows(first, w_chunk, g, buffer));
        };
        operands_.for_each_chunk(source_->chunk_classes, {}, step);
        if (need_x) write_dx(dx_sums, normalize_x, gradients.dx);
        for (const Tensor& part : source_->dscales) gradients.dscale.add_(part);
    }

  private:
    Operands& operands_;
    const Incoming& incoming_;
    const Tensor in_place_;
    const bool need_w_;
    const Targets targets_;
    std::unique_ptr<GradientSource> source_;

    int64_t dw_bytes() const {  // of a class
        return operands_.width * static_cast<int64_t>(incoming_.lse.element_size());
    }

    RawGradient raw_gradient(const Tensor& sums, const Tensor& inverse) const {
        RawGradient raw = {};
        raw.sums = sums.const_data_ptr();
        raw.inverse = inverse.const_data_ptr();
        raw.width = static_cast<int>(operands_.width);
        raw.inverse_limit = operands_.inverse_limit;
        return raw;
    }

    RawRows raw_rows(int64_t first, const Tensor& w_chunk, const Tensor& g, Tensor& buffer) const {
        const int64_t count = w_chunk.size(0);
        if (!in_place_.defined() && !buffer.defined())  // the first chunk is the longest
            buffer = operands_.statistics({count, operands_.width});
        const Tensor sums =
            in_place_.defined() ? in_place_.narrow(0, first, count) : buffer.narrow(0, 0, count);
        mm(sums, g, source_->x);
        RawGradient raw = raw_gradient(sums, incoming_.w_inv.narrow(0, first, count));
        raw.factor = pointer(source_->dw_factor);
        raw.slot = targets_.slot.const_data_ptr<int>() + first;
        raw.y = operands_.y.const_data_ptr<int64_t>();
        raw.pairs = static_cast<int>(operands_.pairs());
        raw.first = first;
        raw.table = targets_.sums.const_data_ptr();
        raw.radial = pointer(targets_.radial);
        raw.normalize = operands_.normalize_w;
        return {first, w_chunk, sums, raw};
    }

    void write_dx(const Tensor& sums, bool normalize_x, const Tensor& dx) const {
        if (source_->row_weight.defined()) sums.mul_(source_->row_weight.unsqueeze(1));
        ProjectCall call = {};
        call.raw = raw_gradient(sums, incoming_.x_inv);
        call.raw.factor = pointer(source_->dx_factor);
        call.raw.factor_stride = source_->dx_factor.has_value() && source_->dx_factor->dim() == 1;
        call.raw.table = targets_.dx.const_data_ptr();
        call.raw.normalize = normalize_x;
        call.rows = operands_.x.const_data_ptr();
        call.out = dx.mutable_data_ptr();
        call.count = operands_.n;
        call.d = static_cast<int>(operands_.d);
        call.out_type = type_of(dx.scalar_type(), "dx");
        call.vectors = has_vectors(dx);
        launch_project(call, operands_.type, operands_.stream);
    }
};

void write_dw(const Operands& operands, const RawRows& part, const Tensor& dw) {
    ProjectCall call = {};
    call.raw = part.raw;
    call.rows = part.rows.const_data_ptr();
    call.index = operands.index_from(part.first);
    const Tensor out = call.index ? dw : dw.narrow(0, part.first, part.count());
    call.out = out.mutable_data_ptr();
    call.count = part.count();
    call.d = static_cast<int>(operands.d);
    call.out_type = type_of(dw.scalar_type(), "dw");
    call.vectors = has_vectors(out);
    launch_project(call, operands.type, operands.stream);
}

// Whether the GEMM's sums fit in the place of their result.
bool holds_sums(const Operands& operands, const Tensor& dw, const Incoming& incoming) {
    return dw.numel() > 0 && !operands.index.has_value() && operands.width == operands.d &&
           dw.scalar_type() == incoming.lse.scalar_type() && dw.is_contiguous();
}

// Returns numbers of pairs, which come shaped as y, in the order of the kernels.
OptionalTensor checked_by_target(const OptionalTensor& t, const char* name, const Tensor& y) {
    check_per_target(t, name, y);
    return t.has_value() ? OptionalTensor(by_target(*t)) : t;
}

OptionalTensor contiguous(const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(t->contiguous()) : t;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x,                    // (N, D)
    const Tensor& w,                    // (C, D)
    const Tensor& y,                    // (N,) or (N, targets)
    const Tensor& scale,                // ()
    const OptionalTensor& bias,         // (c,), c of the C classes take part
    const OptionalTensor& index,        // (c,)
    const Tensor& lse,                  // (N,)
    const Tensor& x_inv,                // (N,)
    const Tensor& w_inv,                // (c,)
    const Tensor& tiles,                // (c, N up to a multiple of 16), or (0,)
    const Tensor& grad_lse,             // (N,)
    const Tensor& grad_target,          // shaped as y
    const OptionalTensor& grad_w_norm,  // shaped as y
    const OptionalTensor& grad_sum,     // (N,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w,
    bool need_bias, bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants,      // (K,)
    const OptionalTensor& w_rounded, int64_t sub_centers) {
    const OpGuard guard(x);
    Operands operands({x, w, y, scale, bias, index, normalize_w, compute_dtype, transform,
                       row_parameter, constants, w_rounded, false, sub_centers},
                      need_bias || need_scale);
    operands.read_x({});
    const Incoming incoming = {lse.contiguous(),
                               x_inv.contiguous(),
                               w_inv.contiguous(),
                               grad_lse.contiguous(),
                               *checked_by_target(grad_target, "grad_target", y),
                               checked_by_target(grad_w_norm, "grad_w_norm", y),
                               contiguous(grad_sum),
                               need_bias,
                               need_scale};
    const Gradients gradients(operands, x, incoming, need_x);
    const Tensor dw = at::empty(need_w ? w.sizes() : at::IntArrayRef{0}, w.options());
    if (index.has_value()) dw.zero_();  // rows outside the index get no gradient
    Sweep(operands, incoming, tiles, gradients.dbias, dw.numel() > 0,
          holds_sums(operands, dw, incoming) ? dw : Tensor())
        .run(gradients, normalize_x, [&](const RawRows& part) { write_dw(operands, part, dw); });
    return {gradients.dx, dw, gradients.dbias, gradients.dscale};
}

std::tuple<Tensor, Tensor, Tensor> head_step(
    const Tensor& x,                    // (N, D)
    const Tensor& w,                    // (C, D), written
    const Tensor& y,                    // (N,) or (N, targets)
    const Tensor& scale,                // ()
    const OptionalTensor& bias,         // (c,)
    const OptionalTensor& index,        // (c,)
    const Tensor& lse,                  // (N,)
    const Tensor& x_inv,                // (N,)
    const Tensor& w_inv,                // (c,), written
    const Tensor& tiles,                // (c, N up to a multiple of 16), or (0,)
    const Tensor& grad_lse,             // (N,)
    const Tensor& grad_target,          // shaped as y
    const OptionalTensor& grad_w_norm,  // shaped as y
    const OptionalTensor& grad_sum,     // (N,)
    at::TensorList state,               // (C, D) or (C, 1) each, written
    const Tensor& numbers,              // (kUpdateNumbers,)
    const Tensor& random,               // (2,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_bias,
    bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants,      // (K,)
    c10::string_view rule, bool project, int64_t first_class, const OptionalTensor& w_rounded,
    int64_t sub_centers) {
    const OpGuard guard(x);
    Operands operands({x, w, y, scale, bias, index, normalize_w, compute_dtype, transform,
                       row_parameter, constants, w_rounded, false, sub_centers},
                      need_bias || need_scale);
    Step step(operands, w, w_inv, state, numbers, random, rule, project, first_class);
    operands.read_x({});
    const Incoming incoming = {lse.contiguous(),
                               x_inv.contiguous(),
                               step.w_inv(),
                               grad_lse.contiguous(),
                               *checked_by_target(grad_target, "grad_target", y),
                               checked_by_target(grad_w_norm, "grad_w_norm", y),
                               contiguous(grad_sum),
                               need_bias,
                               need_scale};
    const Gradients gradients(operands, x, incoming, need_x);
    Sweep(operands, incoming, tiles, gradients.dbias, true, Tensor())
        .run(gradients, normalize_x,
             [&](const RawRows& part) { step.update(part.first, part.raw, part.sums); });
    step.finish();
    return {gradients.dx, gradients.dbias, gradients.dscale};
}

}  // namespace marginkernels::cuda
