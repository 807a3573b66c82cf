// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_bwd: G chunk by chunk, from where it comes and into which GEMMs it goes.

#include "sweep.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// A chunk of G: the GEMM that makes dx of it needs many classes to run well.
constexpr int64_t kGradientBytes = 64 * kMiB;
// A chunk of dw: it should still be in L2 when it is projected.
constexpr int64_t kDwBytes = 16 * kMiB;
// The bound of AirFace's slope, see transforms.h.
constexpr double kSteepestAirFace = 0.6366198 / 1e-4;

struct Gradients {
    Tensor lse, x_inv, w_inv, grad_lse, grad_target;  // (N,), (N,), (C,), (N,), (N,)
    OptionalTensor grad_w_norm, grad_sum;             // (N,)
    bool need_bias, need_scale;
};

// An upper bound () of |f'|.
Tensor steepest_slope(const Sweep& sweep) {
    const auto constant = [&](int64_t k) { return sweep.constants->select(0, k); };
    switch (sweep.transform) {
        case Transform::kAirFace: return at::full({}, kSteepestAirFace, sweep.scale.options());
        case Transform::kMVSoftmax: return constant(0).abs() + 1;
        case Transform::kCurricular: return constant(0).abs() + 2;
        case Transform::kArcNegative: return constant(0).abs();
        default: return at::ones({}, sweep.scale.options());
    }
}

// 2^k (), such that the largest entry of G times it lies in fp16's upper range. Zero rows, whose
// inverse norms say nothing, count as 1, as they do in G.
Tensor power_of_two(const Sweep& sweep, const Gradients& g) {
    const auto factor = [&](const Tensor& inverse, const Tensor& times) {
        return at::where(inverse < sweep.inverse_limit, inverse * times,
                         at::ones({}, times.options()));
    };
    Tensor magnitude = g.grad_lse.abs();
    if (g.grad_sum.has_value()) magnitude = magnitude + g.grad_sum->abs();
    Tensor largest = (magnitude * factor(g.x_inv, sweep.scale)).amax() * steepest_slope(sweep);
    if (sweep.normalize_w) largest = largest * factor(g.w_inv, at::ones_like(sweep.scale)).amax();
    // where everything is 0 any factor does, but 0 times infinity would not
    const Tensor exponent = (14 - largest.clamp_min(1e-30).log2()).floor();
    return at::exp2(exponent.clamp(-100, 100));
}

// G (classes, N), recomputed by the tile program into one buffer. fp16 has too little range for G:
// there it is G times a power of two, chosen on the device.
class TileGradient {
  public:
    TileGradient(Sweep& sweep, const Gradients& g, const Tensor& dbias)
        : x(sweep.x.narrow(0, 0, sweep.n)), sweep_(sweep), flags_(sweep.flags()), dbias_(dbias) {
        need_scale_ = g.need_scale;
        general_ = sweep.bias.has_value() || sweep.transform != Transform::kIdentity ||
                   g.need_bias || g.need_scale;
        if (sweep.type == Type::kFloat16) {
            g_scale_ = power_of_two(sweep, g);
            dx_factor = dw_factor = g_scale_->reciprocal();
        }
        q_ = sweep.normalize_w ? sweep.padded(g.w_inv, sweep.classes, 1)
                               : at::ones({sweep.classes}, g.w_inv.options());
        stride_ = round_up(sweep.n, 16);
        chunk = std::min(sweep.chunk_classes(kGradientBytes, stride_ * sweep.x.element_size()),
                         sweep.classes);
        g_ = at::empty({chunk, stride_}, sweep.x.options());
        rows_ = sweep.statistics({kGradientPlanes, sweep.rows});
        GradientRows call = {};
        call.x_inv = floats(g.x_inv);
        call.scale = floats(sweep.scale);
        call.lse = floats(g.lse);
        call.grad_lse = floats(g.grad_lse);
        call.grad_sum = floats(g.grad_sum);
        call.g_scale = floats(g_scale_);
        call.planes = rows_.mutable_data_ptr<float>();
        call.inverse_limit = static_cast<float>(sweep.inverse_limit);
        call.n = static_cast<int>(sweep.n);
        call.padded = static_cast<int>(sweep.rows);
        call.general = general_;
        launch_gradient_rows(call, sweep.stream);
        columns_ = sweep.columns(chunk / kTileClasses);
    }

    Tensor x;           // the other operand of dw
    Tensor row_weight;  // of dx, where there is one
    OptionalTensor dx_factor, dw_factor;
    int64_t chunk;

    Tensor next(int64_t first, const Tensor& w_chunk) {
        const int64_t count = w_chunk.size(0);
        GradientCall call = {};
        call.tile = sweep_.tile_call(first, w_chunk, q_, flags_, columns_);
        call.general = general_;
        call.rows = floats(rows_);
        call.inverse_limit = static_cast<float>(sweep_.inverse_limit);
        call.g = g_.mutable_data_ptr();
        call.g_stride = static_cast<int>(stride_);
        Tensor dbias, dscale;
        if (dbias_.numel() > 0) {
            dbias = sweep_.statistics({sweep_.row_tiles(), round_up(count, kTileClasses)});
            call.dbias = dbias.mutable_data_ptr<float>();
        }
        if (need_scale_) {
            dscale = sweep_.statistics({sweep_.row_tiles() * columns_ * 4});
            call.dscale = dscale.mutable_data_ptr<float>();
        }
        launch_gradient(call, sweep_.variant(), sweep_.stream);
        if (dbias.defined()) dbias_.narrow(0, first, count).copy_(dbias.narrow(1, 0, count).sum(0));
        if (dscale.defined()) dscales.push_back(dscale.sum());
        return g_.narrow(0, 0, count).narrow(1, 0, sweep_.n);
    }

    std::vector<Tensor> dscales;  // () each

  private:
    Sweep& sweep_;
    Tensor flags_, q_, rows_, g_, dbias_;
    OptionalTensor g_scale_;
    int64_t stride_, columns_;
    bool need_scale_, general_;
};

// G (classes, N) over the vendor's GEMM, in one buffer.
class GemmGradient {
  public:
    GemmGradient(Sweep& sweep, const Gradients& g, const Tensor& dbias)
        : x(sweep.x), sweep_(sweep), gradients_(g), dbias_(dbias) {
        chunk =
            std::min(sweep.chunk_classes(kProductBytes, sweep.n * sweep.x.element_size()), sweep.c);
        g_ = sweep.statistics({chunk, sweep.n});
    }

    Tensor x, row_weight;
    OptionalTensor dx_factor, dw_factor;
    int64_t chunk;

    Tensor next(int64_t first, const Tensor& w_chunk) {
        const Tensor products = g_.narrow(0, 0, w_chunk.size(0));
        mm(products, w_chunk, x.t());
        DenseGradient call = {};
        call.chunk = sweep_.dense_call(first, products, gradients_.x_inv, gradients_.w_inv);
        call.lse = gradients_.lse.const_data_ptr();
        call.grad_lse = gradients_.grad_lse.const_data_ptr();
        call.grad_sum = pointer(gradients_.grad_sum);
        Tensor dscale;
        if (dbias_.numel() > 0)
            call.dbias = dbias_.narrow(0, first, w_chunk.size(0)).mutable_data_ptr();
        if (gradients_.need_scale) {
            dscale = sweep_.statistics({w_chunk.size(0)});
            call.dscale = dscale.mutable_data_ptr();
        }
        launch_dense_gradient(call, sweep_.transform, sweep_.type, sweep_.stream);
        if (dscale.defined()) dscales.push_back(dscale.sum());
        return products;
    }

    std::vector<Tensor> dscales;

  private:
    Sweep& sweep_;
    const Gradients& gradients_;
    Tensor g_, dbias_;
};

// exp(z - offset) q_j as forward kept it: G but for a factor per row. That goes into the rows of x
// for dw, and into those of the result for dx. Where all cosines are near -1 row_weight is near the
// end of fp32's range: it only meets unit rows, or small sums.
class SavedGradient {
  public:
    SavedGradient(Sweep& sweep, const Gradients& g, const Tensor& tiles)
        : tiles_(tiles.narrow(1, 0, sweep.n)) {
        const Tensor offset = (sweep.scale - 59).clamp_min(0);
        // lse is -inf only in rows without negatives, whose exponentials are all 0
        const Tensor exponent = at::where(g.lse.isinf(), 0, offset - g.lse);
        row_weight = g.grad_lse * exponent.exp();
        dx_factor = g.x_inv * sweep.scale;
        dw_factor = sweep.scale;
        const Tensor rows = sweep.x.narrow(0, 0, sweep.n);
        const Tensor units = rows * g.x_inv.unsqueeze(1);
        x = (units * row_weight.unsqueeze(1)).to(rows.scalar_type());
        chunk = sweep.chunk_classes(kGradientBytes, sweep.n * sweep.x.element_size());
    }

    Tensor x, row_weight;
    OptionalTensor dx_factor, dw_factor;
    int64_t chunk;

    Tensor next(int64_t first, const Tensor& w_chunk) {
        return tiles_.narrow(0, first, w_chunk.size(0));
    }

    std::vector<Tensor> dscales;

  private:
    Tensor tiles_;
};

// The target's column of G, see target_kernel.
struct TargetColumn {
    Tensor coefficient, slot, sums, label_rows;
    OptionalTensor radial;

    TargetColumn(const Sweep& sweep, const Gradients& g)
        : coefficient(sweep.statistics({sweep.n})),
          slot(at::full({sweep.c}, -1, sweep.y.options().dtype(at::kInt))),
          sums(sweep.statistics({sweep.n, sweep.width})),
          label_rows(sweep.label_rows()) {
        if (g.grad_w_norm.has_value()) radial = sweep.statistics({sweep.n});
        Targets call = {};
        call.x = sweep.x.const_data_ptr();
        call.y = sweep.y.const_data_ptr<int64_t>();
        call.x_inv = g.x_inv.const_data_ptr();
        call.w_inv = g.w_inv.const_data_ptr();
        call.scale = sweep.scale.const_data_ptr();
        call.grad_target = g.grad_target.const_data_ptr();
        call.grad_w_norm = pointer(g.grad_w_norm);
        call.coefficient = coefficient.mutable_data_ptr();
        call.slot = slot.mutable_data_ptr<int>();
        call.sums = sums.mutable_data_ptr();
        call.radial = radial.has_value() ? radial->mutable_data_ptr() : nullptr;
        call.n = static_cast<int>(sweep.n);
        call.width = static_cast<int>(sweep.width);
        call.normalize_w = sweep.normalize_w;
        launch_targets(call, sweep.type, sweep.stream);
    }
};

// What both projections are called with.
Projection projection_of(const Sweep& sweep, const Tensor& gradient, const Tensor& rows,
                         const Tensor& out) {
    Projection call = {};
    call.gradient = gradient.const_data_ptr();
    call.rows = rows.const_data_ptr();
    call.out = out.mutable_data_ptr();
    call.count = out.size(0);
    call.width = static_cast<int>(sweep.width);
    call.d = static_cast<int>(sweep.d);
    call.inverse_limit = sweep.inverse_limit;
    call.out_type = type_of(out.scalar_type(), "out");
    return call;
}

// dw of a chunk, part by part: a GEMM, then the projection while the result is in L2.
void write_dw(const Sweep& sweep, const Gradients& gradients, const TargetColumn& target,
              const Tensor& g, const Tensor& x, const OptionalTensor& factor, const Tensor& w_chunk,
              int64_t first, Tensor& buffer, const Tensor& dw) {
    const int64_t row_bytes = sweep.width * static_cast<int64_t>(gradients.lse.element_size());
    const int64_t most = std::max<int64_t>(kDwBytes / std::max<int64_t>(row_bytes, 1), 64);
    if (!buffer.defined())
        buffer = sweep.statistics({std::min(most, w_chunk.size(0)), sweep.width});
    for (int64_t start = 0; start < w_chunk.size(0); start += most) {
        const int64_t count = std::min(most, w_chunk.size(0) - start);
        const Tensor raw = buffer.narrow(0, 0, count);
        mm(raw, g.narrow(0, start, count), x);
        const Tensor rows = w_chunk.narrow(0, start, count);
        Projection call = projection_of(sweep, raw, rows, dw.narrow(0, first + start, count));
        const Tensor inverse = gradients.w_inv.narrow(0, first + start, count);
        call.inverse = inverse.const_data_ptr();
        call.factor = pointer(factor);
        call.index = target.slot.const_data_ptr<int>() + first + start;
        call.table = target.sums.const_data_ptr();
        call.radial = pointer(target.radial);
        call.normalize = sweep.normalize_w;
        launch_projection(call, sweep.type, sweep.stream);
    }
}

template <class Source>
void take_gradients(Sweep& sweep, Source&& source, const Gradients& g, const Tensor& dx,
                    const Tensor& dw, const Tensor& dscale, bool normalize_x) {
    const TargetColumn target(sweep, g);
    const Tensor x = sweep.x.narrow(0, 0, sweep.n);
    Tensor dx_raw, dw_raw;
    if (dx.numel() > 0) dx_raw = sweep.statistics({sweep.n, sweep.width}).zero_();
    sweep.for_each_chunk(source.chunk, [&](int64_t first, const Tensor& w_chunk) {
        const Tensor chunk = source.next(first, w_chunk);
        if (dx_raw.defined()) add_mm(dx_raw, chunk.t(), w_chunk);
        if (dw.numel() > 0)
            write_dw(sweep, g, target, chunk, source.x, source.dw_factor, w_chunk, first, dw_raw,
                     dw);
    });
    if (dx_raw.defined()) {
        if (source.row_weight.defined()) dx_raw.mul_(source.row_weight.unsqueeze(1));
        Projection call = projection_of(sweep, dx_raw, x, dx);
        call.inverse = g.x_inv.const_data_ptr();
        call.factor = pointer(source.dx_factor);
        call.factor_stride = source.dx_factor.has_value() && source.dx_factor->dim() == 1;
        call.table = target.label_rows.const_data_ptr();
        call.coefficient = target.coefficient.const_data_ptr();
        call.normalize = normalize_x;
        launch_projection(call, sweep.type, sweep.stream);
    }
    for (const Tensor& part : source.dscales) dscale.add_(part);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> head_bwd(
    const Tensor& x,             // (N, D)
    const Tensor& w,             // (C, D)
    const Tensor& y,             // (N,)
    const Tensor& scale,         // ()
    const OptionalTensor& bias,  // (C,)
    const Tensor& lse,           // (N,)
    const Tensor& x_inv, const Tensor& w_inv, const Tensor& tiles,
    const Tensor& grad_lse,     // (N,)
    const Tensor& grad_target,  // (N,)
    const OptionalTensor& grad_w_norm, const OptionalTensor& grad_sum, bool normalize_x,
    bool normalize_w, at::ScalarType compute_dtype, bool need_x, bool need_w, bool need_bias,
    bool need_scale, c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants) {
    const OpGuard guard(x);
    Sweep sweep(
        {x, w, y, scale, bias, normalize_w, compute_dtype, transform, row_parameter, constants},
        need_bias || need_scale);
    const auto contiguous = [](const OptionalTensor& t) {
        return t.has_value() ? OptionalTensor(t->contiguous()) : t;
    };
    const Gradients g = {lse.contiguous(),
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
    const Tensor dbias = sweep.statistics({need_bias ? sweep.c : 0});
    const Tensor dscale = need_scale ? sweep.statistics({}).zero_() : sweep.statistics({0});
    if (sweep.n == 0) return {dx, dw.zero_(), dbias.zero_(), dscale};
    const auto run = [&](auto&& source) {
        take_gradients(sweep, source, g, dx, dw, dscale, normalize_x);
    };
    if (tiles.numel() > 0) {
        run(SavedGradient(sweep, g, tiles));
    } else if (sweep.tiled) {
        run(TileGradient(sweep, g, dbias));
    } else {
        run(GemmGradient(sweep, g, dbias));
    }
    return {dx, dw, dbias, dscale};
}

}  // namespace marginkernels::cuda
