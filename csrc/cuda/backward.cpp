// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_bwd and head_step: take G chunk by chunk from a source, and hand it to the GEMMs that make
// dx and dw. head_bwd stores dw; head_step moves w and its state by it while it is in L2.

#include "sources.h"
#include "step.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// A chunk of dw, which should still be in L2 when it is projected.
constexpr int64_t kDwChunkBytes = 16 * kMiB;

// The target's column of G, see target_kernel.
struct Targets {
    Tensor coefficient, slot, sums, label_rows;
    OptionalTensor radial;

    Targets(const Operands& operands, const Incoming& incoming)
        : coefficient(operands.statistics({operands.n})),
          slot(at::full({operands.c}, -1, operands.y.options().dtype(at::kInt))),
          sums(operands.statistics({operands.n, operands.width})),
          label_rows(operands.label_rows()) {
        if (incoming.grad_w_norm.has_value()) radial = operands.statistics({operands.n});
        TargetCall call = {};
        call.x = operands.x.const_data_ptr();
        call.y = operands.y.const_data_ptr<int64_t>();
        call.x_inv = incoming.x_inv.const_data_ptr();
        call.w_inv = incoming.w_inv.const_data_ptr();
        call.scale = operands.scale.const_data_ptr();
        call.grad_target = incoming.grad_target.const_data_ptr();
        call.grad_w_norm = pointer(incoming.grad_w_norm);
        call.coefficient = coefficient.mutable_data_ptr();
        call.slot = slot.mutable_data_ptr<int>();
        call.sums = sums.mutable_data_ptr();
        call.radial = radial.has_value() ? radial->mutable_data_ptr() : nullptr;
        call.n = static_cast<int>(operands.n);
        call.width = static_cast<int>(operands.width);
        call.normalize_w = operands.normalize_w;
        launch_target(call, operands.type, operands.stream);
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
    Sweep(Operands& operands, const Incoming& incoming, const Tensor& tiles, const Tensor& dbias)
        : operands_(operands),
          incoming_(incoming),
          source_(gradient_source(operands, incoming, tiles, dbias)),
          targets_(operands, incoming) {}

    // Writes dx and dscale where they are not empty. Calls take(raw rows) for dw part by part,
    // while a part is in L2, and only after the part's chunk of w has given its share to dx.
    template <class Take>
    void run(const Gradients& gradients, bool normalize_x, bool need_w, Take&& take) {
        Tensor dx_sums, buffer;
        if (gradients.dx.numel() > 0)
            dx_sums = operands_.statistics({operands_.n, operands_.width}).zero_();
        operands_.for_each_chunk(source_->chunk_classes, [&](int64_t first, const Tensor& w_chunk) {
            const Tensor g = source_->next(first, w_chunk);
            if (dx_sums.defined()) add_mm(dx_sums, g.t(), w_chunk);
            if (need_w) take_parts(first, w_chunk, g, buffer, take);
        });
        if (dx_sums.defined()) write_dx(dx_sums, normalize_x, gradients.dx);
        for (const Tensor& part : source_->dscales) gradients.dscale.add_(part);
    }

  private:
    Operands& operands_;
    const Incoming& incoming_;
    std::unique_ptr<GradientSource> source_;
    Targets targets_;

    RawGradient raw_gradient(const Tensor& sums, const Tensor& inverse) const {
        RawGradient raw = {};
        raw.sums = sums.const_data_ptr();
        raw.inverse = inverse.const_data_ptr();
        raw.width = static_cast<int>(operands_.width);
        raw.inverse_limit = operands_.inverse_limit;
        return raw;
    }

    template <class Take>
    void take_parts(int64_t first_of_chunk, const Tensor& w_chunk, const Tensor& g, Tensor& buffer,
                    Take&& take) {
        const int64_t row_bytes =
            operands_.width * static_cast<int64_t>(incoming_.lse.element_size());
        const int64_t most = std::max<int64_t>(kDwChunkBytes / std::max<int64_t>(row_bytes, 1), 64);
        if (!buffer.defined())
            buffer = operands_.statistics({std::min(most, w_chunk.size(0)), operands_.width});
        for (int64_t start = 0; start < w_chunk.size(0); start += most) {
            const int64_t count = std::min(most, w_chunk.size(0) - start);
            const int64_t first = first_of_chunk + start;
            const Tensor sums = buffer.narrow(0, 0, count);
            mm(sums, g.narrow(0, start, count), source_->x);
            RawGradient raw = raw_gradient(sums, incoming_.w_inv.narrow(0, first, count));
            raw.factor = pointer(source_->dw_factor);
            raw.slot = targets_.slot.const_data_ptr<int>() + first;
            raw.table = targets_.sums.const_data_ptr();
            raw.radial = pointer(targets_.radial);
            raw.normalize = operands_.normalize_w;
            take(RawRows{first, w_chunk.narrow(0, start, count), sums, raw});
        }
    }

    void write_dx(const Tensor& sums, bool normalize_x, const Tensor& dx) const {
        if (source_->row_weight.defined()) sums.mul_(source_->row_weight.unsqueeze(1));
        ProjectCall call = {};
        call.raw = raw_gradient(sums, incoming_.x_inv);
        call.raw.factor = pointer(source_->dx_factor);
        call.raw.factor_stride = source_->dx_factor.has_value() && source_->dx_factor->dim() == 1;
        call.raw.table = targets_.label_rows.const_data_ptr();
        call.raw.coefficient = targets_.coefficient.const_data_ptr();
        call.raw.normalize = normalize_x;
        call.rows = operands_.x.const_data_ptr();
        call.out = dx.mutable_data_ptr();
        call.count = operands_.n;
        call.d = static_cast<int>(operands_.d);
        call.out_type = type_of(dx.scalar_type(), "dx");
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
    launch_project(call, operands.type, operands.stream);
}

OptionalTensor contiguous(const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(t->contiguous()) : t;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x,                    // (N, D)
    const Tensor& w,                    // (C, D)
    const Tensor& y,                    // (N,)
    const Tensor& scale,                // ()
    const OptionalTensor& bias,         // (c,), c of the C classes take part
    const OptionalTensor& index,        // (c,)
    const Tensor& lse,                  // (N,)
    const Tensor& x_inv,                // (N,)
    const Tensor& w_inv,                // (c,)
    const Tensor& tiles,                // (c, N up to a multiple of 16), or (0,)
    const Tensor& grad_lse,             // (N,)
    const Tensor& grad_target,          // (N,)
    const OptionalTensor& grad_w_norm,  // (N,)
    const OptionalTensor& grad_sum,     // (N,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w,
    bool need_bias, bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants,      // (K,)
    const OptionalTensor& /*w_rounded*/) {
    const OpGuard guard(x);
    Operands operands({x, w, y, scale, bias, index, normalize_w, compute_dtype, transform,
                       row_parameter, constants},
                      need_bias || need_scale);
    const Incoming incoming = {lse.contiguous(),
                               x_inv.contiguous(),
                               w_inv.contiguous(),
                               grad_lse.contiguous(),
                               grad_target.contiguous(),
                               contiguous(grad_w_norm),
                               contiguous(grad_sum),
                               need_bias,
                               need_scale};
    const Gradients gradients(operands, x, incoming, need_x);
    const Tensor dw = at::empty(need_w ? w.sizes() : at::IntArrayRef{0}, w.options());
    if (index.has_value()) dw.zero_();  // rows outside the index get no gradient
    Sweep(operands, incoming, tiles, gradients.dbias)
        .run(gradients, normalize_x, dw.numel() > 0,
             [&](const RawRows& part) { write_dw(operands, part, dw); });
    return {gradients.dx, dw, gradients.dbias, gradients.dscale};
}

std::tuple<Tensor, Tensor, Tensor> head_step(
    const Tensor& x,                    // (N, D)
    const Tensor& w,                    // (C, D), written
    const Tensor& y,                    // (N,)
    const Tensor& scale,                // ()
    const OptionalTensor& bias,         // (c,)
    const OptionalTensor& index,        // (c,)
    const Tensor& lse,                  // (N,)
    const Tensor& x_inv,                // (N,)
    const Tensor& w_inv,                // (c,), written
    const Tensor& tiles,                // (c, N up to a multiple of 16), or (0,)
    const Tensor& grad_lse,             // (N,)
    const Tensor& grad_target,          // (N,)
    const OptionalTensor& grad_w_norm,  // (N,)
    const OptionalTensor& grad_sum,     // (N,)
    at::TensorList state,               // (C, D) or (C, 1) each, written
    const Tensor& numbers,              // (kUpdateNumbers,)
    const Tensor& random,               // (2,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_bias,
    bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants,      // (K,)
    c10::string_view rule, bool project, int64_t first_class, const OptionalTensor& /*w_rounded*/) {
    const OpGuard guard(x);
    Operands operands({x, w, y, scale, bias, index, normalize_w, compute_dtype, transform,
                       row_parameter, constants},
                      need_bias || need_scale);
    Step step(operands, w, w_inv, state, numbers, random, rule, project, first_class);
    const Incoming incoming = {lse.contiguous(),
                               x_inv.contiguous(),
                               step.w_inv(),
                               grad_lse.contiguous(),
                               grad_target.contiguous(),
                               contiguous(grad_w_norm),
                               contiguous(grad_sum),
                               need_bias,
                               need_scale};
    const Gradients gradients(operands, x, incoming, need_x);
    Sweep(operands, incoming, tiles, gradients.dbias)
        .run(gradients, normalize_x, true,
             [&](const RawRows& part) { step.update(part.first, part.raw, part.sums); });
    step.finish();
    return {gradients.dx, gradients.dbias, gradients.dscale};
}

}  // namespace marginkernels::cuda
