// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// head_fwd: decides which kernel runs on which chunk of the classes.

#include "operands.h"
#include "vendor_gemm.h"

namespace marginkernels::cuda {
namespace {

// Blocks of dense_statistics_kernel that a multiprocessor runs at once.
constexpr int kDenseBlocksPerSm = 8;
// The fewest classes that such a block is worth.
constexpr int kDenseClasses = 64;
// Rounded rows of w.
constexpr int64_t kWChunkBytes = 256 * kMiB;

// The results of the op; marginkernels/ops.py says what they are.
struct Results {
    Tensor lse;                    // (N,)
    Tensor target_cosine, w_norm;  // shaped as y
    bool want_sum, want_max;
    Tensor logit_sum, logit_max;  // (N,), or (0,)
    Tensor x_inv, w_inv;          // (N,), (classes,)
    Tensor tiles;                 // (c, N up to a multiple of 16), or (0,)

    Results(const Operands& operands, const Tensor& y, bool save_tiles, bool want_sum,
            bool want_max)
        : lse(operands.statistics({operands.n})),
          target_cosine(operands.statistics(y.sizes())),
          w_norm(operands.statistics(y.sizes())),
          want_sum(want_sum),
          want_max(want_max),
          logit_sum(operands.statistics({want_sum ? operands.n : 0})),
          logit_max(operands.statistics({want_max ? operands.n : 0})),
          x_inv(operands.statistics({operands.n})),
          w_inv(operands.statistics({operands.classes})),
          tiles(save_tiles ? operands.empty({operands.c, round_up(operands.n, mk::kTilePadding)},
                                            operands.compute)
                           : operands.statistics({0})) {}

    bool saves_tiles() const { return tiles.numel() > 0; }
};

// Takes statistics by the tile program.
class TileStatistics {
  public:
    TileStatistics(Operands& operands, const Results& results, int64_t chunk_classes)
        : operands_(operands),
          results_(results),
          flags_(operands.flags()),
          columns_(operands.columns(std::min(chunk_classes, operands.classes))) {
        q_ = operands.normalize_w ? results.w_inv : at::ones_like(results.w_inv);
        rate_ = operands.statistics({operands.rows});
        const bool transformed = operands.transform != Transform::kIdentity;
        log2_units = !operands.bias.has_value() && !operands.one_versus_rest;
        StatisticsRowsCall call = {};
        call.targets = operands.target_tiles(flags_);
        call.x_inv = floats(results.x_inv);
        call.scale = floats(operands.scale);
        call.rate = rate_.mutable_data_ptr<float>();
        call.per_unit = log2_units && !transformed ? kLog2E : 1.0F;
        call.with_scale = !transformed;
        launch_statistics_rows(call, static_cast<int>(operands.row_tiles()), operands.stream);
        const int64_t warps = operands.small ? SmallTile::kClassWarps : BigTile::kClassWarps;
        partials = operands.statistics({kPlanes, columns_ * warps, operands.n});
        const bool separate_max = transformed || (results.saves_tiles() && results.want_max);
        maximum_plane = separate_max ? kLogitMaximum : kMaximum;
    }

    Tensor partials;
    bool log2_units;
    int maximum_plane;

    void add(int64_t first, const Tensor& w_chunk) {
        StatisticsCall call = {};
        call.tile = operands_.tile_call(first, w_chunk, q_, flags_, columns_);
        call.want_sum = results_.want_sum;
        call.want_max = results_.want_max;
        call.rate = floats(rate_);
        call.partials = partials.mutable_data_ptr<float>();
        call.carry = first > 0;
        if (results_.saves_tiles()) {
            call.tiles = results_.tiles.mutable_data_ptr();
            call.tiles_stride = static_cast<int>(results_.tiles.size(1));
        }
        call.inverse_limit = static_cast<float>(operands_.inverse_limit);
        launch_statistics(call, operands_.variant(), operands_.stream);
    }

  private:
    Operands& operands_;
    const Results& results_;
    Tensor flags_, q_, rate_;
    int64_t columns_;
};

// Takes statistics over the vendor's GEMM.
class GemmStatistics {
  public:
    GemmStatistics(Operands& operands, const Results& results, int64_t chunk_classes)
        : operands_(operands), results_(results) {
        row_blocks_ = ceil_div(operands.n, kDenseRows);
        const int64_t blocks =
            int64_t{multiprocessors()} * kDenseBlocksPerSm / std::max<int64_t>(row_blocks_, 1);
        slices_ = std::max<int64_t>(1, std::min(blocks, chunk_classes / kDenseClasses));
        partials = operands.statistics({kPlanes, slices_, operands.n});
        if (results.saves_tiles()) {
            results.tiles.narrow(1, operands.n, results.tiles.size(1) - operands.n).zero_();
            return;
        }
        products_ = operands.statistics({std::min(chunk_classes, operands.c), operands.n});
    }

    Tensor partials;
    static constexpr bool log2_units = false;
    static constexpr int maximum_plane = kLogitMaximum;

    void add(int64_t first, const Tensor& w_chunk) {
        const int64_t count = w_chunk.size(0);
        const Tensor products =
            results_.saves_tiles()
                ? results_.tiles.narrow(0, first, count).narrow(1, 0, operands_.n)
                : products_.narrow(0, 0, count);
        mm(products, w_chunk, operands_.x.t());
        DenseStatisticsCall call = {};
        call.chunk = operands_.dense_call(first, products, results_.x_inv, results_.w_inv);
        call.partials = partials.mutable_data_ptr();
        call.row_blocks = static_cast<int>(row_blocks_);
        call.slices = static_cast<int>(slices_);
        call.carry = first > 0;
        call.save_tiles = results_.saves_tiles();
        launch_dense_statistics(call, operands_.transform, operands_.type, operands_.stream);
    }

  private:
    Operands& operands_;
    const Results& results_;
    Tensor products_;
    int64_t row_blocks_, slices_;
};

// Merges the partial statistics of every row, and adds the targets' cosines and norms.
template <class Source>
void finish_rows(const Operands& operands, const Results& results, const Source& source) {
    FinishRowsCall call = {};
    call.x = operands.x.const_data_ptr();
    call.w = operands.stored_w();
    call.y = operands.y.const_data_ptr<int64_t>();
    call.x_inv = results.x_inv.const_data_ptr();
    call.w_inv = results.w_inv.const_data_ptr();
    call.partials = source.partials.const_data_ptr();
    call.lse = results.lse.mutable_data_ptr();
    call.target_cosine = results.target_cosine.mutable_data_ptr();
    call.w_norm = results.w_norm.mutable_data_ptr();
    call.logit_sum = results.want_sum ? results.logit_sum.mutable_data_ptr() : nullptr;
    call.logit_max = results.want_max ? results.logit_max.mutable_data_ptr() : nullptr;
    call.n = static_cast<int>(operands.n);
    call.targets = static_cast<int>(operands.targets);
    call.width = static_cast<int>(operands.width);
    call.partials_per_row = static_cast<int>(source.partials.size(1));
    call.maximum_plane = source.maximum_plane;
    call.normalize_w = operands.normalize_w;
    call.log2_units = source.log2_units;
    call.one_versus_rest = operands.one_versus_rest;
    launch_finish_rows(call, operands.type, operands.stream);
}

// Writes norms that are known, and those of padding.
void copy_norms(const Operands& operands, const Tensor& known, const Tensor& w_inv) {
    TORCH_CHECK_VALUE(known.dim() == 1 && known.size(0) == operands.c, "known_w_inv: expected (",
                      operands.c, ",), got ", known.sizes());
    w_inv.narrow(0, 0, operands.c).copy_(known);
    w_inv.narrow(0, operands.c, operands.classes - operands.c).fill_(operands.inverse_limit);
}

// Takes the statistics of all classes chunk by chunk, and the norms of their rows where they are
// not known.
template <class Source>
void take_statistics(Operands& operands, Source&& source, const Results& results,
                     bool norms_are_known, int64_t chunk_classes) {
    const OptionalTensor norms = norms_are_known ? OptionalTensor() : OptionalTensor(results.w_inv);
    operands.for_each_chunk(chunk_classes, norms, [&](int64_t first, const Tensor& w_chunk) {
        if (operands.n > 0) source.add(first, w_chunk);
    });
    if (operands.c == 0) {  // no negatives
        source.partials.zero_();
        source.partials.select(0, kLogitMaximum).fill_(kNoMaximum);
    }
    finish_rows(operands, results, source);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_fwd(
    const Tensor& x,                    // (N, D)
    const Tensor& w,                    // (C, D)
    const Tensor& y,                    // (N,) or (N, targets)
    const Tensor& scale,                // ()
    const OptionalTensor& bias,         // (c,), c of the C classes take part
    const OptionalTensor& index,        // (c,)
    const OptionalTensor& known_w_inv,  // (c,)
    bool normalize_x, bool normalize_w, at::ScalarType compute_dtype, bool save_tiles,
    bool want_sum, bool want_max, c10::string_view transform,
    const OptionalTensor& row_parameter,  // (N,)
    const OptionalTensor& constants,      // (K,)
    bool keep_rounded, int64_t sub_centers) {
    const OpGuard guard(x);
    Operands operands({x,
                       w,
                       y,
                       scale,
                       bias,
                       index,
                       normalize_w,
                       compute_dtype,
                       transform,
                       row_parameter,
                       constants,
                       {},
                       keep_rounded,
                       sub_centers},
                      save_tiles && want_max);
    TORCH_CHECK_VALUE(
        !save_tiles || (normalize_x && normalize_w && !bias.has_value() && !want_sum &&
                        operands.transform == Transform::kIdentity && compute_dtype != at::kHalf &&
                        operands.targets == 1 && sub_centers == 1),
        "save_tiles: needs both sides normalised, no bias, no sum, the identity, one target of a "
        "row, one centre of a class and float32 or bfloat16, got ",
        compute_dtype, ", y ", y.sizes(), " and sub_centers ", sub_centers);
    const Results results(operands, y, save_tiles, want_sum, want_max);
    operands.read_x(normalize_x ? OptionalTensor(results.x_inv) : OptionalTensor());
    if (!normalize_x) results.x_inv.fill_(1);
    const bool norms_are_known = known_w_inv.has_value();
    if (norms_are_known) copy_norms(operands, *known_w_inv, results.w_inv);
    if (operands.tiled) {
        const int64_t chunk = operands.chunk_classes(kWChunkBytes, 0);
        take_statistics(operands, TileStatistics(operands, results, chunk), results,
                        norms_are_known, chunk);
    } else {
        const int64_t row_bytes = operands.n * operands.x.element_size();
        const int64_t chunk = operands.chunk_classes(kProductChunkBytes, row_bytes);
        take_statistics(operands, GemmStatistics(operands, results, chunk), results,
                        norms_are_known, chunk);
    }
    return {results.lse,
            results.target_cosine,
            results.w_norm,
            results.logit_sum,
            results.logit_max,
            results.x_inv,
            results.w_inv.narrow(0, 0, operands.c),
            results.tiles,
            operands.w_rounded};
}

}  // namespace marginkernels::cuda
