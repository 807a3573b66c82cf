// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_bwd: takes G chunk by chunk from a source, and hands it to the GEMMs that make dx and dw.

#include "operands.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// A chunk of G: the GEMM that makes dx of it needs many classes to run well.
constexpr int64_t kGChunkBytes = 64 * kMiB;
// A chunk of dw, which should still be in L2 when it is projected.
constexpr int64_t kDwChunkBytes = 16 * kMiB;

// Results of the forward sweep, and the gradients that arrive for them.
struct Incoming {
    Tensor lse, x_inv, w_inv, grad_lse, grad_target;  // (N,), (N,), (C,), (N,), (N,)
    OptionalTensor grad_w_norm, grad_sum;             // (N,)
    bool need_bias, need_scale;
};

// Returns an upper bound () of |f'|, on the device.
Tensor steepest_slope(const Operands& operands) {
    Tensor bound = at::ones({}, operands.scale.options());
    mk::visit(operands.transform, [&](auto functor) {
        const Tensor constants = operands.constants.value_or(Tensor());
        bound = bound * decltype(functor)::steepest_slope(constants);
    });
    return bound;
}

// Returns 2^k (), such that the largest entry of G times it lies in fp16's upper range. Zero rows,
// whose inverse norms mean nothing, count as 1, as they do in G.
Tensor power_of_two(const Operands& operands, const Incoming& incoming) {
    const auto factor = [&](const Tensor& inverse, const Tensor& times) {
        return at::where(inverse < operands.inverse_limit, inverse * times,
                         at::ones({}, times.options()));
    };
    Tensor magnitude = incoming.grad_lse.abs();
    if (incoming.grad_sum.has_value()) magnitude = magnitude + incoming.grad_sum->abs();
    Tensor largest =
        (magnitude * factor(incoming.x_inv, operands.scale)).amax() * steepest_slope(operands);
    if (operands.normalize_w)
        largest = largest * factor(incoming.w_inv, at::ones_like(operands.scale)).amax();
    // where everything is 0 any factor does, but 0 times infinity would not
    const Tensor exponent = (14 - largest.clamp_min(1e-30).log2()).floor();
    return at::exp2(exponent.clamp(-100, 100));
}

// The base of every source of G. A source has next(first, w_chunk), which returns a chunk of G,
// (classes, N). Some factors are still missing from it; the results are multiplied with them.
struct GradientSource {
    int64_t chunk_classes = 0;
    Tensor x;                             // (N, width): the other operand of dw
    Tensor row_weight;                    // (N,) of dx, or undefined
    OptionalTensor dx_factor, dw_factor;  // (N,) or (), ()
    std::vector<Tensor> dscales;          // () each, parts of a sum
};

// Recomputes G chunk by chunk with the tile program, into one buffer. fp16 has too little range for
// G: there the buffer holds G times a power of two, which is chosen on the device.
class TileGradient : public GradientSource {
  public:
    TileGradient(Operands& operands, const Incoming& incoming, const Tensor& dbias)
        : operands_(operands), flags_(operands.flags()), dbias_(dbias) {
        x = operands.x.narrow(0, 0, operands.n);
        need_scale_ = incoming.need_scale;
        general_ = operands.bias.has_value() || operands.transform != Transform::kIdentity ||
                   incoming.need_bias || incoming.need_scale;
        if (operands.type == Type::kFloat16) {
            g_scale_ = power_of_two(operands, incoming);
            dx_factor = dw_factor = g_scale_->reciprocal();
        }
        q_ = operands.normalize_w ? operands.padded(incoming.w_inv, operands.classes, 1)
                                  : at::ones({operands.classes}, incoming.w_inv.options());
        stride_ = round_up(operands.n, 16);
        const int64_t class_bytes = stride_ * operands.x.element_size();
        chunk_classes =
            std::min(operands.chunk_classes(kGChunkBytes, class_bytes), operands.classes);
        g_ = at::empty({chunk_classes, stride_}, operands.x.options());
        rows_ = row_planes(incoming);
        columns_ = operands.columns(chunk_classes / kTileClasses);
    }

    Tensor next(int64_t first, const Tensor& w_chunk) {
        const int64_t count = w_chunk.size(0);
        GradientCall call = {};
        call.tile = operands_.tile_call(first, w_chunk, q_, flags_, columns_);
        call.general = general_;
        call.rows = floats(rows_);
        call.inverse_limit = static_cast<float>(operands_.inverse_limit);
        call.g = g_.mutable_data_ptr();
        call.g_stride = static_cast<int>(stride_);
        Tensor dbias, dscale;
        if (dbias_.numel() > 0) {
            dbias = operands_.statistics({operands_.row_tiles(), round_up(count, kTileClasses)});
            call.dbias = dbias.mutable_data_ptr<float>();
        }
        if (need_scale_) {
            dscale = operands_.statistics({operands_.row_tiles() * columns_ * 4});
            call.dscale = dscale.mutable_data_ptr<float>();
        }
        launch_gradient(call, operands_.variant(), operands_.stream);
        if (dbias.defined()) dbias_.narrow(0, first, count).copy_(dbias.narrow(1, 0, count).sum(0));
        if (dscale.defined()) dscales.push_back(dscale.sum());
        return g_.narrow(0, 0, count).narrow(1, 0, operands_.n);
    }

  private:
    Operands& operands_;
    Tensor flags_, q_, rows_, g_, dbias_;
    OptionalTensor g_scale_;
    int64_t stride_, columns_;
    bool need_scale_, general_;

    // Returns the planes of gradient_rows_kernel.
    Tensor row_planes(const Incoming& incoming) const {
        const Tensor planes = operands_.statistics({kGradientPlanes, operands_.rows});
        GradientRowsCall call = {};
        call.x_inv = floats(incoming.x_inv);
        call.scale = floats(operands_.scale);
        call.lse = floats(incoming.lse);
        call.grad_lse = floats(incoming.grad_lse);
        call.grad_sum = floats(incoming.grad_sum);
        call.g_scale = floats(g_scale_);
        call.planes = planes.mutable_data_ptr<float>();
        call.inverse_limit = static_cast<float>(operands_.inverse_limit);
        call.n = static_cast<int>(operands_.n);
        call.padded = static_cast<int>(operands_.rows);
        call.general = general_;
        launch_gradient_rows(call, operands_.stream);
        return planes;
    }
};

// Recomputes G chunk by chunk over the vendor's GEMM, in one buffer.
class GemmGradient : public GradientSource {
  public:
    GemmGradient(Operands& operands, const Incoming& incoming, const Tensor& dbias)
        : operands_(operands), incoming_(incoming), dbias_(dbias) {
        x = operands.x;
        const int64_t class_bytes = operands.n * operands.x.element_size();
        chunk_classes =
            std::min(operands.chunk_classes(kProductChunkBytes, class_bytes), operands.c);
        g_ = operands.statistics({chunk_classes, operands.n});
    }

    Tensor next(int64_t first, const Tensor& w_chunk) {
        const Tensor products = g_.narrow(0, 0, w_chunk.size(0));
        mm(products, w_chunk, x.t());
        DenseGradientCall call = {};
        call.chunk = operands_.dense_call(first, products, incoming_.x_inv, incoming_.w_inv);
        call.lse = incoming_.lse.const_data_ptr();
        call.grad_lse = incoming_.grad_lse.const_data_ptr();
        call.grad_sum = pointer(incoming_.grad_sum);
        Tensor dscale;
        if (dbias_.numel() > 0)
            call.dbias = dbias_.narrow(0, first, w_chunk.size(0)).mutable_data_ptr();
        if (incoming_.need_scale) {
            dscale = operands_.statistics({w_chunk.size(0)});
            call.dscale = dscale.mutable_data_ptr();
        }
        launch_dense_gradient(call, operands_.transform, operands_.type, operands_.stream);
        if (dscale.defined()) dscales.push_back(dscale.sum());
        return products;
    }

  private:
    Operands& operands_;
    const Incoming& incoming_;
    Tensor g_, dbias_;
};

// Hands out exp(z - offset) q_j as forward saved it, which is G but for a factor per row. For dw
// the factor is multiplied into the rows of x, for dx into the rows of the result. Where all
// cosines are near -1, row_weight is near the end of fp32's range: it only meets unit rows, or
// small sums.
class SavedGradient : public GradientSource {
  public:
    SavedGradient(Operands& operands, const Incoming& incoming, const Tensor& tiles)
        : tiles_(tiles.narrow(1, 0, operands.n)) {
        const Tensor offset = (operands.scale - mk::kOffsetStart).clamp_min(0);
        // lse is -inf only in rows without negatives, whose exponentials are all 0
        const Tensor exponent = at::where(incoming.lse.isinf(), 0, offset - incoming.lse);
        row_weight = incoming.grad_lse * exponent.exp();
        dx_factor = incoming.x_inv * operands.scale;
        dw_factor = operands.scale;
        const Tensor rows = operands.x.narrow(0, 0, operands.n);
        const Tensor units = rows * incoming.x_inv.unsqueeze(1);
        x = (units * row_weight.unsqueeze(1)).to(rows.scalar_type());
        chunk_classes =
            operands.chunk_classes(kGChunkBytes, operands.n * operands.x.element_size());
    }

    Tensor next(int64_t first, const Tensor& w_chunk) {
        return tiles_.narrow(0, first, w_chunk.size(0));
    }

  private:
    Tensor tiles_;
};

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

// Returns the arguments that both projections share.
ProjectCall project_call(const Operands& operands, const Tensor& gradient, const Tensor& rows,
                         const Tensor& out) {
    ProjectCall call = {};
    call.gradient = gradient.const_data_ptr();
    call.rows = rows.const_data_ptr();
    call.out = out.mutable_data_ptr();
    call.count = out.size(0);
    call.width = static_cast<int>(operands.width);
    call.d = static_cast<int>(operands.d);
    call.inverse_limit = operands.inverse_limit;
    call.out_type = type_of(out.scalar_type(), "out");
    return call;
}

// Writes dx from its sum over all classes.
void write_dx(const Operands& operands, const Incoming& incoming, const Targets& targets,
              const GradientSource& source, const Tensor& raw, bool normalize_x, const Tensor& dx) {
    if (source.row_weight.defined()) raw.mul_(source.row_weight.unsqueeze(1));
    ProjectCall call = project_call(operands, raw, operands.x.narrow(0, 0, operands.n), dx);
    call.inverse = incoming.x_inv.const_data_ptr();
    call.factor = pointer(source.dx_factor);
    call.factor_stride = source.dx_factor.has_value() && source.dx_factor->dim() == 1;
    call.table = targets.label_rows.const_data_ptr();
    call.coefficient = targets.coefficient.const_data_ptr();
    call.normalize = normalize_x;
    launch_project(call, operands.type, operands.stream);
}

// Writes dw of a chunk part by part: a GEMM, then the projection while the result is in L2.
void write_dw(const Operands& operands, const Incoming& incoming, const Targets& targets,
              const GradientSource& source, int64_t first, const Tensor& w_chunk, const Tensor& g,
              Tensor& buffer, const Tensor& dw) {
    const int64_t row_bytes = operands.width * static_cast<int64_t>(incoming.lse.element_size());
    const int64_t most = std::max<int64_t>(kDwChunkBytes / std::max<int64_t>(row_bytes, 1), 64);
    if (!buffer.defined())
        buffer = operands.statistics({std::min(most, w_chunk.size(0)), operands.width});
    for (int64_t start = 0; start < w_chunk.size(0); start += most) {
        const int64_t count = std::min(most, w_chunk.size(0) - start);
        const Tensor raw = buffer.narrow(0, 0, count);
        mm(raw, g.narrow(0, start, count), source.x);
        const Tensor rows = w_chunk.narrow(0, start, count);
        ProjectCall call = project_call(operands, raw, rows, dw.narrow(0, first + start, count));
        const Tensor inverse = incoming.w_inv.narrow(0, first + start, count);
        call.inverse = inverse.const_data_ptr();
        call.factor = pointer(source.dw_factor);
        call.index = targets.slot.const_data_ptr<int>() + first + start;
        call.table = targets.sums.const_data_ptr();
        call.radial = pointer(targets.radial);
        call.normalize = operands.normalize_w;
        launch_project(call, operands.type, operands.stream);
    }
}

// Writes all gradients from the chunks of G.
template <class Source>
void take_gradients(Operands& operands, Source&& source, const Incoming& incoming, bool normalize_x,
                    const Tensor& dx, const Tensor& dw, const Tensor& dscale) {
    const Targets targets(operands, incoming);
    Tensor dx_raw, dw_raw;
    if (dx.numel() > 0) dx_raw = operands.statistics({operands.n, operands.width}).zero_();
    operands.for_each_chunk(source.chunk_classes, [&](int64_t first, const Tensor& w_chunk) {
        const Tensor g = source.next(first, w_chunk);
        if (dx_raw.defined()) add_mm(dx_raw, g.t(), w_chunk);
        if (dw.numel() > 0)
            write_dw(operands, incoming, targets, source, first, w_chunk, g, dw_raw, dw);
    });
    if (dx_raw.defined()) write_dx(operands, incoming, targets, source, dx_raw, normalize_x, dx);
    for (const Tensor& part : source.dscales) dscale.add_(part);
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
    const OptionalTensor& bias,         // (C,)
    const OptionalTensor& index,        // (C,) rows of w
    const Tensor& lse,                  // (N,)
    const Tensor& x_inv,                // (N,)
    const Tensor& w_inv,                // (C,)
    const Tensor& tiles,                // (C, N up to a multiple of 16), or (0,)
    const Tensor& grad_lse,             // (N,)
    const Tensor& grad_target,          // (N,)
    const OptionalTensor& grad_w_norm,  // (N,)
    const OptionalTensor& grad_sum,     // (N,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w,
    bool need_bias, bool need_scale, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants) {    // (K,)
    const OpGuard guard(x);
    if (index.has_value()) {
        auto gradients = head_bwd(x, w.index_select(0, *index), y, scale, bias, std::nullopt, lse,
                                  x_inv, w_inv, tiles, grad_lse, grad_target, grad_w_norm, grad_sum,
                                  normalize_x, normalize_w, compute_dtype, need_x, need_w,
                                  need_bias, need_scale, transform, row_parameter, constants);
        auto& dw = std::get<1>(gradients);
        if (need_w) dw = at::zeros_like(w).index_copy_(0, *index, dw);
        return gradients;
    }
    Operands operands(
        {x, w, y, scale, bias, normalize_w, compute_dtype, transform, row_parameter, constants},
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
    const Tensor dx = at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
    const Tensor dw = at::empty(need_w ? w.sizes() : at::IntArrayRef{0}, w.options());
    const Tensor dbias = operands.statistics({need_bias ? operands.c : 0});
    const Tensor dscale = need_scale ? operands.statistics({}).zero_() : operands.statistics({0});
    if (operands.n == 0) return {dx, dw.zero_(), dbias.zero_(), dscale};
    const auto run = [&](auto&& source) {
        take_gradients(operands, source, incoming, normalize_x, dx, dw, dscale);
    };
    if (tiles.numel() > 0) {
        run(SavedGradient(operands, incoming, tiles));
    } else if (operands.tiled) {
        run(TileGradient(operands, incoming, dbias));
    } else {
        run(GemmGradient(operands, incoming, dbias));
    }
    return {dx, dw, dbias, dscale};
}

}  // namespace marginkernels::cuda
