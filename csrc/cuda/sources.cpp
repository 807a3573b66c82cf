// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "sources.h"

#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

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
    if (operands.n == 0) return at::ones({}, operands.scale.options());
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

// Recomputes G chunk by chunk with the tile program, into one buffer. fp16 has too little range for
// G: there the buffer holds G times a power of two, which is chosen on the device.
class TileGradient final : public GradientSource {
  public:
    TileGradient(Operands& operands, const Incoming& incoming, const Tensor& dbias,
                 int64_t other_bytes)
        : operands_(operands), flags_(operands.flags()), dbias_(dbias) {
        x = operands.x.narrow(0, 0, operands.n);
        need_scale_ = incoming.need_scale;
        general_ = operands.bias.has_value() || operands.transform != Transform::kIdentity ||
                   incoming.need_bias || incoming.need_scale || operands.sub_centers > 1;
        if (operands.type == Type::kFloat16) {
            g_scale_ = power_of_two(operands, incoming);
            dx_factor = dw_factor = g_scale_->reciprocal();
        }
        q_ = operands.normalize_w ? continued(incoming.w_inv, operands.classes)
                                  : at::ones({operands.classes}, incoming.w_inv.options());
        stride_ = round_up(operands.n, 16);
        const int64_t class_bytes = stride_ * operands.x.element_size();
        chunk_classes =
            std::min(operands.chunk_classes(kBackwardChunkBytes, class_bytes + other_bytes),
                     operands.classes);
        g_ = at::empty({chunk_classes, stride_}, operands.x.options());
        rows_ = row_planes(incoming);
        columns_ = operands.columns(chunk_classes);
    }

    Tensor next(int64_t first, const Tensor& w_chunk) override {
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
            dbias = operands_.statistics(
                {operands_.row_tiles(), round_up(count, kTileClasses * operands_.sub_centers)});
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

    // Continues (C,) to `size` numbers, which may be any: classes from C on are excluded. The norms
    // that the forward sweep returns have room behind them.
    Tensor continued(const Tensor& t, int64_t size) const {
        const int64_t stored = static_cast<int64_t>(t.storage().nbytes() / t.element_size());
        if (t.storage_offset() + size <= stored) return t.as_strided({size}, {1});
        return operands_.padded(t, size, 1);
    }

    // Returns the planes of gradient_rows_kernel.
    Tensor row_planes(const Incoming& incoming) const {
        const Tensor planes = operands_.statistics({kGradientPlanes, operands_.rows});
        GradientRowsCall call = {};
        call.targets = operands_.target_tiles(flags_);
        call.x_inv = floats(incoming.x_inv);
        call.scale = floats(operands_.scale);
        call.lse = floats(incoming.lse);
        call.grad_lse = floats(incoming.grad_lse);
        call.grad_sum = floats(incoming.grad_sum);
        call.g_scale = floats(g_scale_);
        call.planes = planes.mutable_data_ptr<float>();
        call.inverse_limit = static_cast<float>(operands_.inverse_limit);
        call.general = general_;
        launch_gradient_rows(call, static_cast<int>(operands_.row_tiles()), operands_.stream);
        return planes;
    }
};

// Recomputes G chunk by chunk over the vendor's GEMM, in one buffer.
class GemmGradient final : public GradientSource {
  public:
    GemmGradient(Operands& operands, const Incoming& incoming, const Tensor& slot,
                 const Tensor& dbias, int64_t other_bytes)
        : operands_(operands), incoming_(incoming), slot_(slot), dbias_(dbias) {
        x = operands.x;
        const int64_t class_bytes = operands.n * operands.x.element_size();
        chunk_classes = std::min(
            {operands.chunk_classes(kProductChunkBytes, class_bytes),
             operands.chunk_classes(kBackwardChunkBytes, class_bytes + other_bytes), operands.c});
        g_ = operands.statistics({chunk_classes, operands.n});
    }

    Tensor next(int64_t first, const Tensor& w_chunk) override {
        const Tensor products = g_.narrow(0, 0, w_chunk.size(0));
        mm(products, w_chunk, x.t());
        DenseGradientCall call = {};
        call.chunk = operands_.dense_call(first, products, incoming_.x_inv, incoming_.w_inv);
        call.lse = incoming_.lse.const_data_ptr();
        call.grad_lse = incoming_.grad_lse.const_data_ptr();
        call.grad_sum = pointer(incoming_.grad_sum);
        call.slot = slot_.const_data_ptr<int>() + first;
        Tensor dscale;
        if (dbias_.numel() > 0)
            call.dbias = dbias_.narrow(0, first, w_chunk.size(0)).mutable_data_ptr();
        if (incoming_.need_scale) {
            dscale = operands_.statistics({w_chunk.size(0) / operands_.sub_centers});
            call.dscale = dscale.mutable_data_ptr();
        }
        launch_dense_gradient(call, operands_.transform, operands_.type, operands_.stream);
        if (dscale.defined()) dscales.push_back(dscale.sum());
        return products;
    }

  private:
    Operands& operands_;
    const Incoming& incoming_;
    Tensor g_, slot_, dbias_;
};

// Hands out exp(z - offset) q_j as forward saved it, which is G but for a factor per row. For dw
// the factor is multiplied into the rows of x, for dx into the rows of the result. Where all
// cosines are near -1, row_weight is near the end of fp32's range: it only meets unit rows, or
// small sums.
class SavedGradient final : public GradientSource {
  public:
    SavedGradient(Operands& operands, const Incoming& incoming, const Tensor& tiles,
                  int64_t other_bytes)
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
        chunk_classes = operands.chunk_classes(kBackwardChunkBytes, other_bytes);
    }

    Tensor next(int64_t first, const Tensor& w_chunk) override {
        return tiles_.narrow(0, first, w_chunk.size(0));
    }

  private:
    Tensor tiles_;
};

}  // namespace

std::unique_ptr<GradientSource> gradient_source(Operands& operands, const Incoming& incoming,
                                                const Tensor& tiles, const Tensor& slot,
                                                const Tensor& dbias, int64_t other_bytes) {
    TORCH_CHECK_VALUE(tiles.numel() == 0 || (operands.targets == 1 && operands.sub_centers == 1),
                      "tiles: expected (0,) with several targets of a row or several centres of a "
                      "class, got ",
                      tiles.sizes());
    TORCH_CHECK_VALUE(operands.sub_centers == 1 || !incoming.need_bias || operands.bias.has_value(),
                      "need_bias: expected a bias with sub_centers ", operands.sub_centers,
                      ", got none");
    if (tiles.numel() > 0)
        return std::make_unique<SavedGradient>(operands, incoming, tiles, other_bytes);
    if (operands.tiled)
        return std::make_unique<TileGradient>(operands, incoming, dbias, other_bytes);
    return std::make_unique<GemmGradient>(operands, incoming, slot, dbias, other_bytes);
}

}  // namespace marginkernels::cuda
