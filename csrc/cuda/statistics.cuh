// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The forward sweep: softmax statistics over the negatives, from the tile program.
//
// What: per row the maximum and sum of exponentials (and, where wanted, the sum and maximum of the
// logits), one partial per warp's column of classes. Never materialised: logits, a mask, anything
// per logit unless exponentials are to be saved. Fast because: each thread keeps statistics of its
// own 8 rows in registers over all its tiles, and lanes meet once, at the end; five instructions
// per logit, and a mask only in tiles with a target.

#pragma once

#include <type_traits>

#include "centers.cuh"

namespace marginkernels::cuda {

// Holds the options that a kernel is compiled for.
template <class F, bool kBias_ = false, bool kWantSum_ = false, bool kSaveTiles_ = false,
          bool kSeparateMax_ = false>
struct StatisticsOptions {
    using Functor = F;
    static constexpr bool kBias = kBias_;
    static constexpr bool kWantSum = kWantSum_;          // of the logits
    static constexpr bool kSaveTiles = kSaveTiles_;      // exponentials with a constant offset
    static constexpr bool kSeparateMax = kSeparateMax_;  // of the logits, where m is not that
    static constexpr bool kTransformed = !std::is_same_v<F, mk::Identity>;
    static constexpr bool kOneVersusRest = F::kOneVersusRest;
    static constexpr bool kSubCenters = false;  // whether a class has several
    // logits are in units of ln 2 where the row's factor takes that in; with a bias they are plain,
    // which keeps the digits of a large one, and so they are where softplus reads them
    static constexpr float kToLog2 = kBias || kOneVersusRest ? kLog2E : 1.0F;
};

// The options where a class has several centres.
template <class F, bool kBias>
struct CentersOptions : StatisticsOptions<F, kBias, true, false, !std::is_same_v<F, mk::Identity>> {
    static constexpr bool kSubCenters = true;
};

// The statistics that a thread keeps of its 8 rows. One versus rest, l is the sum of softplus(z),
// total that of sigmoid(z), and m stays as it is, so that merging just adds.
template <class Options>
struct RowStatistics {
    float m[8], l[8];
    float total[Options::kWantSum ? 8 : 1], top[Options::kSeparateMax ? 8 : 1];

    __device__ __forceinline__ explicit RowStatistics(float first_maximum) {
#pragma unroll
        for (int row = 0; row < 8; ++row) {
            m[row] = first_maximum;
            l[row] = 0.0F;
            if constexpr (Options::kWantSum) total[row] = 0.0F;
            if constexpr (Options::kSeparateMax) top[row] = kNoMaximum;
        }
    }

    // Merges the statistics that another thread, or the launch before, has of a row.
    __device__ __forceinline__ void merge(int row, float other_m, float other_l, float other_total,
                                          float other_top) {
        const float higher = fmaxf(m[row], other_m);
        l[row] = l[row] * ptx::exp2((m[row] - higher) * Options::kToLog2) +
                 other_l * ptx::exp2((other_m - higher) * Options::kToLog2);
        m[row] = higher;
        if constexpr (Options::kWantSum) total[row] += other_total;
        if constexpr (Options::kSeparateMax) top[row] = fmaxf(top[row], other_top);
    }

    // Merges the statistics of the four lanes that have the same rows.
    __device__ __forceinline__ void merge_lanes() {
#pragma unroll
        for (int row = 0; row < 8; ++row)
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                const auto other = [&](float value) { return __shfl_xor_sync(~0U, value, lanes); };
                const float other_m = other(m[row]), other_l = other(l[row]);
                merge(row, other_m, other_l, Options::kWantSum ? other(total[row]) : 0.0F,
                      Options::kSeparateMax ? other(top[row]) : 0.0F);
            }
    }

    __device__ __forceinline__ void load(const float* partial, int64_t plane, int row) {
        merge(row, partial[kMaximum * plane], partial[kExponentials * plane],
              Options::kWantSum ? partial[kLogitSum * plane] : 0.0F,
              Options::kSeparateMax ? partial[kLogitMaximum * plane] : 0.0F);
    }

    __device__ __forceinline__ void store(float* partial, int64_t plane, int row) const {
        partial[kMaximum * plane] = m[row];
        partial[kExponentials * plane] = l[row];
        if constexpr (Options::kWantSum) partial[kLogitSum * plane] = total[row];
        if constexpr (Options::kSeparateMax) partial[kLogitMaximum * plane] = top[row];
    }
};

// Turns v, dot products times q_j or -inf for the excluded, into logits of a row and a block of
// classes, but for a factor that is returned. `top` is the maximum before a transform. With a bias
// the logits are summed here, where the excluded still differ from classes with a bias of -inf.
template <class Options>
__device__ __forceinline__ float to_logits(float (&v)[8], float rate, const float (&bias)[8],
                                           float parameter, const TileCall& call, float scale,
                                           float& top, float& total) {
    if constexpr (Options::kBias) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const bool excluded = v[k] == -INFINITY;
            v[k] = ptx::fma(v[k], rate, bias[k]);  // the same bits as in general_gradient
            if constexpr (Options::kWantSum) total += excluded ? 0.0F : v[k];
        }
        return 1.0F;
    } else if constexpr (Options::kTransformed) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float c = v[k] * rate;
            const bool excluded = v[k] == -INFINITY;
            top = fmaxf(top, c * scale);
            const float f = scale * Options::Functor::apply(c, parameter, call.constants).value;
            v[k] = excluded ? -INFINITY : f;
        }
        return 1.0F;
    } else {
        return rate;
    }
}

// Adds a tile's row to the statistics, one versus rest.
template <class Options, class Sums>
__device__ __forceinline__ void add_row_one_versus_rest(RowStatistics<Options>& stats, Sums& sums,
                                                        int row, float rate,
                                                        const float (&bias)[Sums::kClassBlocks][8],
                                                        float parameter, const TileCall& call,
                                                        float scale) {
#pragma unroll
    for (int b = 0; b < Sums::kClassBlocks; ++b) {
        float z[8], total = 0.0F;
#pragma unroll
        for (int k = 0; k < 8; ++k) z[k] = sums.at(row, b, k);
        to_logits<Options>(z, rate, bias[b], parameter, call, scale, stats.top[row], total);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const auto term = softplus(z[k]);
            stats.l[row] += term.value;
            stats.total[row] += term.slope;
        }
    }
}

// Adds a tile's row to the statistics. Leaves exponentials in the tile where they are saved.
template <class Options, class Sums>
__device__ __forceinline__ void add_row(RowStatistics<Options>& stats, Sums& sums, int row,
                                        float rate, const float (&bias)[Sums::kClassBlocks][8],
                                        float parameter, const TileCall& call, float scale) {
    float v[Sums::kClassBlocks][8], factor, highest = -INFINITY, top = kNoMaximum, total = 0.0F;
#pragma unroll
    for (int b = 0; b < Sums::kClassBlocks; ++b) {
#pragma unroll
        for (int k = 0; k < 8; ++k) v[b][k] = sums.at(row, b, k);
        factor = to_logits<Options>(v[b], rate, bias[b], parameter, call, scale, top, total);
#pragma unroll
        for (int k = 0; k < 8; ++k) highest = fmaxf(highest, v[b][k]);
    }
    highest *= factor;  // a constant factor may be taken out of the maximum
    float l = stats.l[row];
    const float higher = Options::kSaveTiles ? stats.m[row] : fmaxf(stats.m[row], highest);
    if constexpr (!Options::kSaveTiles) l *= ptx::exp2((stats.m[row] - higher) * Options::kToLog2);
    stats.m[row] = higher;
#pragma unroll
    for (int b = 0; b < Sums::kClassBlocks; ++b)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float p = ptx::exp2((v[b][k] * factor - higher) * Options::kToLog2);
            if constexpr (Options::kSaveTiles) sums.at(row, b, k) = p;
            if constexpr (Options::kWantSum && !Options::kBias)
                total += v[b][k] == -INFINITY ? 0.0F : v[b][k];
            l += p;
        }
    stats.l[row] = l;
    if constexpr (Options::kWantSum) stats.total[row] += total * factor;
    if constexpr (Options::kSeparateMax)
        stats.top[row] = fmaxf(stats.top[row], Options::kSaveTiles ? highest : top);
}

template <class T, class Tile, class Options>
__global__ void __launch_bounds__(Tile::kThreads) statistics_kernel(const StatisticsCall call) {
    using Sums = Accumulator<Tile>;
    const TileCall& tile_call = call.tile;
    const Position<Tile> position;
    const int first_row = row_tile_of_block(tile_call) * Tile::kRows + position.row;
    const int rows_here = threadIdx.x % 4 == 0 ? tile_call.n - first_row : 0;  // of the results
    const int partial = column_of_block(tile_call) * Tile::kClassWarps + position.class_warp;
    const int64_t plane = static_cast<int64_t>(tile_call.columns) * Tile::kClassWarps * tile_call.n;
    float* const partials = call.partials + static_cast<int64_t>(partial) * tile_call.n + first_row;

    const float scale = *tile_call.scale * (Options::kOneVersusRest ? 1.0F : kLog2E);
    // both sides are normalised and s < mk::kOffsetScaleLimit: exp(z - offset) neither overflows
    // nor vanishes
    const float offset = fmaxf(scale - mk::kOffsetStart * kLog2E, 0.0F);
    RowStatistics<Options> stats(Options::kSaveTiles ? offset : kNoMaximum);
#pragma unroll
    for (int row = 0; row < 8; ++row)
        if (call.carry && row < rows_here) stats.load(partials + row, plane, row);

    // Adds a tile of products times q; bias_of(row) returns the bias of the row's classes.
    const auto add_tile = [&](Sums& sums, int tile, auto&& bias_of) {
        float rate[8], parameter[8];
        load_eight(rate, call.rate + first_row);
        if (Options::kTransformed && tile_call.row_parameter)
            load_eight(parameter, tile_call.row_parameter + first_row);
        for_each_excluded(tile_call, position, tile,
                          [&](int row, int b, int k) { sums.at(row, b, k) = -INFINITY; });
#pragma unroll
        for (int row = 0; row < 8; ++row) {
            if constexpr (Options::kOneVersusRest) {
                add_row_one_versus_rest(stats, sums, row, rate[row], bias_of(row), parameter[row],
                                        tile_call, scale);
            } else {
                add_row(stats, sums, row, rate[row], bias_of(row), parameter[row], tile_call,
                        scale);
            }
        }
    };

    if constexpr (Options::kSubCenters) {
        for_each_tile_of_centers<T>(tile_call, position, [&](Winners<Tile>& winners, int tile) {
            const int first_class = tile * kTileClasses + position.class_;
            float bias[1][8];
            add_tile(winners.products, tile, [&](int row) -> const auto& {
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if constexpr (Options::kBias)
                        bias[0][k] =
                            tile_call
                                .bias[winners.center(row, k, first_class, tile_call.sub_centers)];
                return bias;
            });
        });
    } else {
        for_each_tile<T>(tile_call, position, [&](Sums& sums, int tile) {
            const int first_class = tile * kTileClasses + position.class_;
            float q[Sums::kClassBlocks][8], bias[Sums::kClassBlocks][8];
#pragma unroll
            for (int b = 0; b < Sums::kClassBlocks; ++b) {
                load_eight(q[b], tile_call.q + first_class + b * 32);
                if constexpr (Options::kBias)
                    load_eight(bias[b], tile_call.bias + first_class + b * 32);
#pragma unroll
                for (int row = 0; row < 8; ++row)
#pragma unroll
                    for (int k = 0; k < 8; ++k) sums.at(row, b, k) *= q[b][k];
            }
            add_tile(sums, tile, [&](int) -> const auto& { return bias; });
            if constexpr (Options::kSaveTiles) {
#pragma unroll
                for (int b = 0; b < Sums::kClassBlocks; ++b)
#pragma unroll
                    for (int k = 0; k < 8; ++k)
                        q[b][k] = q[b][k] < call.inverse_limit ? q[b][k] : 1.0F;  // as in G
                store_classes<T>(sums, q, call.tiles, call.tiles_stride, call.tiles_stride,
                                 first_class, first_row, tile_call.c - first_class);
            }
        });
    }

    stats.merge_lanes();
#pragma unroll
    for (int row = 0; row < 8; ++row)
        if (row < rows_here) stats.store(partials + row, plane, row);
}

}  // namespace marginkernels::cuda
