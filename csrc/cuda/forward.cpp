// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_fwd: which kernel runs on which chunk of the classes.

#include "sweep.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// Blocks of the statistics over a GEMM's result that a multiprocessor runs at once.
constexpr int kDenseBlocksPerSm = 8;
// Classes of a block of those, at least.
constexpr int kDenseClasses = 64;

// Statistics by the tile program.
class TileStatistics {
  public:
    TileStatistics(Sweep& sweep, const Tensor& x_inv, const Tensor& w_inv, const Tensor& saved,
                   const FinishRows& wanted)
        : sweep_(sweep), flags_(sweep.flags()), columns_(sweep.columns(sweep.class_tiles())) {
        q_ = sweep.normalize_w ? w_inv : at::ones_like(w_inv);
        rate_ = sweep.statistics({sweep.rows});
        const bool transformed = sweep.transform != Transform::kIdentity;
        log2_units = !sweep.bias.has_value();
        launch_statistics_rows(floats(x_inv), floats(sweep.scale), rate_.mutable_data_ptr<float>(),
                               static_cast<int>(sweep.n), static_cast<int>(sweep.rows),
                               log2_units && !transformed, !transformed, sweep.stream);
        const int64_t warps = sweep.small ? SmallTile::kClassWarps : BigTile::kClassWarps;
        partials = sweep.statistics({kPlanes, columns_ * warps, sweep.n});
        want_sum_ = wanted.logit_sum != nullptr;
        want_max_ = wanted.logit_max != nullptr;
        const bool own_maximum = transformed || (saved.numel() > 0 && want_max_);
        maximum_plane = own_maximum ? kLogitMaximum : kMaximum;
        saved_ = saved;
    }

    Tensor partials;
    bool log2_units;
    int maximum_plane;

    void add(int64_t first, const Tensor& w_chunk) {
        StatisticsCall call = {};
        call.tile = sweep_.tile_call(first, w_chunk, q_, flags_, columns_);
        call.want_sum = want_sum_;
        call.want_max = want_max_;
        call.rate = floats(rate_);
        call.partials = partials.mutable_data_ptr<float>();
        call.carry = first > 0;
        if (saved_.numel() > 0) {
            call.saved = saved_.mutable_data_ptr();
            call.saved_stride = static_cast<int>(saved_.size(1));
        }
        call.inverse_limit = static_cast<float>(sweep_.inverse_limit);
        launch_statistics(call, sweep_.variant(), sweep_.stream);
    }

  private:
    Sweep& sweep_;
    Tensor flags_, q_, rate_, saved_;
    int64_t columns_;
    bool want_sum_, want_max_;
};

// Statistics over the vendor's GEMM.
class GemmStatistics {
  public:
    GemmStatistics(Sweep& sweep, const Tensor& x_inv, const Tensor& w_inv, const Tensor& saved,
                   int64_t chunk)
        : sweep_(sweep), x_inv_(x_inv), w_inv_(w_inv), saved_(saved) {
        row_blocks_ = ceil_div(sweep.n, kDenseRows);
        const int64_t blocks =
            int64_t{multiprocessors()} * kDenseBlocksPerSm / std::max<int64_t>(row_blocks_, 1);
        slices_ = std::max<int64_t>(1, std::min(blocks, chunk / kDenseClasses));
        partials = sweep.statistics({kPlanes, slices_, sweep.n});
        if (saved.numel() > 0) {
            saved.narrow(1, sweep.n, saved.size(1) - sweep.n).zero_();
            return;
        }
        products_ = sweep.statistics({std::min(chunk, sweep.c), sweep.n});
    }

    Tensor partials;
    static constexpr bool log2_units = false;
    static constexpr int maximum_plane = kLogitMaximum;

    void add(int64_t first, const Tensor& w_chunk) {
        const int64_t count = w_chunk.size(0);
        const bool save = saved_.numel() > 0;
        const Tensor products = save ? saved_.narrow(0, first, count).narrow(1, 0, sweep_.n)
                                     : products_.narrow(0, 0, count);
        mm(products, w_chunk, sweep_.x.t());
        DenseStatistics call = {};
        call.chunk = sweep_.dense_call(first, products, x_inv_, w_inv_);
        call.partials = partials.mutable_data_ptr();
        call.row_blocks = static_cast<int>(row_blocks_);
        call.slices = static_cast<int>(slices_);
        call.carry = first > 0;
        call.save = save;
        launch_dense_statistics(call, sweep_.transform, sweep_.type, sweep_.stream);
    }

  private:
    Sweep& sweep_;
    Tensor x_inv_, w_inv_, saved_, products_;
    int64_t row_blocks_, slices_;
};

// Statistics of all classes, chunk by chunk, and the norms of their rows; then what becomes of
// them.
template <class Source>
void take_statistics(Sweep& sweep, Source&& source, const Tensor& w_inv, int64_t chunk,
                     FinishRows finish) {
    sweep.for_each_chunk(chunk, [&](int64_t first, const Tensor& w_chunk) {
        const int64_t stop = std::min(first + chunk, w_inv.size(0));
        sweep.inverse_norms(w_chunk, w_chunk.size(0), w_inv.narrow(0, first, stop - first));
        if (sweep.n > 0) source.add(first, w_chunk);
    });
    if (sweep.c == 0) source.partials.zero_();  // no negatives
    finish.partials = source.partials.const_data_ptr();
    finish.partials_per_row = static_cast<int>(source.partials.size(1));
    finish.maximum_plane = source.maximum_plane;
    finish.log2_units = source.log2_units;
    launch_finish_rows(finish, sweep.type, sweep.stream);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_fwd(
    const Tensor& x,             // (N, D)
    const Tensor& w,             // (C, D)
    const Tensor& y,             // (N,)
    const Tensor& scale,         // ()
    const OptionalTensor& bias,  // (C,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool save_tiles,
    bool want_sum, bool want_max, c10::string_view transform, const OptionalTensor& row_parameter,
    const OptionalTensor& constants) {
    const OpGuard guard(x);
    Sweep sweep(
        {x, w, y, scale, bias, normalize_w, compute_dtype, transform, row_parameter, constants},
        save_tiles && want_max);
    TORCH_CHECK_VALUE(
        !save_tiles || (normalize_x && normalize_w && !bias.has_value() && !want_sum &&
                        sweep.transform == Transform::kIdentity && compute_dtype != at::kHalf),
        "save_tiles: needs both sides normalised, no bias, no sum, the identity and float32 or "
        "bfloat16, got ",
        compute_dtype);
    const int64_t n = sweep.n;
    const Tensor lse = sweep.statistics({n}), d = sweep.statistics({n});
    const Tensor w_norm = sweep.statistics({n});
    const Tensor logit_sum = sweep.statistics({want_sum ? n : 0});
    const Tensor logit_max = sweep.statistics({want_max ? n : 0});
    const Tensor x_inv = sweep.statistics({n}), w_inv = sweep.statistics({sweep.classes});
    const Tensor saved =
        save_tiles ? sweep.empty({sweep.c, round_up(n, 16)}, compute_dtype) : sweep.statistics({0});
    if (normalize_x) {
        sweep.inverse_norms(sweep.x, n, x_inv);
    } else {
        x_inv.fill_(1);
    }

    const Tensor label_rows = sweep.label_rows();
    FinishRows finish = {};
    finish.x = sweep.x.const_data_ptr();
    finish.w_y = label_rows.const_data_ptr();
    finish.y = sweep.y.const_data_ptr<int64_t>();
    finish.x_inv = x_inv.const_data_ptr();
    finish.w_inv = w_inv.const_data_ptr();
    finish.lse = lse.mutable_data_ptr();
    finish.d = d.mutable_data_ptr();
    finish.w_norm = w_norm.mutable_data_ptr();
    finish.logit_sum = want_sum ? logit_sum.mutable_data_ptr() : nullptr;
    finish.logit_max = want_max ? logit_max.mutable_data_ptr() : nullptr;
    finish.n = static_cast<int>(n);
    finish.width = static_cast<int>(sweep.width);
    finish.normalize_w = normalize_w;
    if (sweep.tiled) {
        const int64_t chunk = sweep.chunk_classes(std::numeric_limits<int64_t>::max(), 1);
        take_statistics(sweep, TileStatistics(sweep, x_inv, w_inv, saved, finish), w_inv, chunk,
                        finish);
    } else {
        const int64_t chunk = sweep.chunk_classes(kProductBytes, n * sweep.x.element_size());
        take_statistics(sweep, GemmStatistics(sweep, x_inv, w_inv, saved, chunk), w_inv, chunk,
                        finish);
    }
    return {lse, d, w_norm, logit_sum, logit_max, x_inv, w_inv.narrow(0, 0, sweep.c), saved};
}

}  // namespace marginkernels::cuda
