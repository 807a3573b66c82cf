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

#include "tile.cuh"

namespace marginkernels::cuda {

// Options that a kernel is compiled for.
template <class F, bool kBias_, bool kMore_, bool kSave_>
struct StatisticsOptions {
    using Functor = F;
    static constexpr bool kBias = kBias_;
    static constexpr bool kMore = kMore_;  // sum and maximum of the logits
    static constexpr bool kSave = kSave_;  // exponentials with a constant offset
    static constexpr bool kTransformed = !std::is_same_v<F, mk::Identity>;
    // logits are in units of ln 2 where the row's factor takes that in; with a bias they are plain,
    // which keeps the digits of a large one
    static constexpr float kToLog2 = kBias ? kLog2E : 1.0F;
    // where the maximum of the logits is not that of the exponents
    static constexpr bool kOwnMaximum = kMore && (kSave || kTransformed);
};

template <class Options>
struct RowStatistics {
    float m[8], l[8];
    float sum[Options::kMore ? 8 : 1], top[Options::kOwnMaximum ? 8 : 1];
};

// Merges the statistics of two threads, or of the launch before.
template <class Options>
__device__ __forceinline__ void merge(RowStatistics<Options>& to, int row, float m, float l,
                                      float sum, float top) {
    const float higher = fmaxf(to.m[row], m);
    to.l[row] = to.l[row] * ptx::exp2((to.m[row] - higher) * Options::kToLog2) +
                l * ptx::exp2((m - higher) * Options::kToLog2);
    to.m[row] = higher;
    if constexpr (Options::kMore) to.sum[row] += sum;
    if constexpr (Options::kOwnMaximum) to.top[row] = fmaxf(to.top[row], top);
}

// One row of a block of classes: v are dot products times q_j, -inf for the dead.
template <class Options>
__device__ __forceinline__ void to_logits(float (&v)[8], float rate, const float (&bias)[8],
                                          float parameter, const float* constants, float scale,
                                          float& top) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        if constexpr (Options::kBias) v[k] = v[k] * rate + bias[k];
        if constexpr (Options::kTransformed) {
            const float c = v[k] * rate;
            const bool dead = v[k] == -INFINITY;
            top = fmaxf(top, c * scale);
            v[k] = scale * Options::Functor::apply(c, parameter, constants).value;
            v[k] = dead ? -INFINITY : v[k];
        }
    }
}

template <class T, class Tile, class Options>
__global__ void __launch_bounds__(Tile::kThreads) statistics_kernel(const StatisticsCall call) {
    using Sums = Accumulator<Tile>;
    const TileCall& tile_call = call.tile;
    const Position<Tile> position;
    const int first_row = row_tile_of_block(tile_call) * Tile::kRows + position.row;
    const int lane = threadIdx.x % kWarp;
    const int partial = column_of_block(tile_call) * Tile::kClassWarps + position.class_warp;
    const int64_t plane = static_cast<int64_t>(tile_call.columns) * Tile::kClassWarps * tile_call.n;
    float* const partials = call.partials + static_cast<int64_t>(partial) * tile_call.n + first_row;

    const float scale = *tile_call.scale * kLog2E;
    // both sides are normalised and s < 73: exp(z - offset) neither overflows nor vanishes
    const float offset = fmaxf(scale - 59.0F * kLog2E, 0.0F);
    RowStatistics<Options> stats = {};
#pragma unroll
    for (int row = 0; row < 8; ++row) {
        stats.m[row] = Options::kSave ? offset : kNoMaximum;
        if constexpr (Options::kOwnMaximum) stats.top[row] = kNoMaximum;
        if (call.carry && lane % 4 == 0 && first_row + row < tile_call.n) {
            const float* p = partials + row;
            merge(stats, row, p[kMaximum * plane], p[kExponentials * plane],
                  Options::kMore ? p[kLogitSum * plane] : 0.0F,
                  Options::kOwnMaximum ? p[kLogitMaximum * plane] : 0.0F);
        }
    }

    for_each_tile<T>(tile_call, position, [&](Sums& sums, int tile) {
        const int first_class = tile * kTileClasses + position.class_;
        float q[Sums::kClassBlocks][8], bias[Sums::kClassBlocks][8], rate[8], parameter[8];
        load_eight(rate, call.rate + first_row);
        if (Options::kTransformed && tile_call.row_parameter)
            load_eight(parameter, tile_call.row_parameter + first_row);
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
        if (is_flagged(tile_call, tile))
            for_each_dead(tile_call, position, tile,
                          [&](int row, int b, int k) { sums.at(row, b, k) = -INFINITY; });
#pragma unroll
        for (int row = 0; row < 8; ++row) {
            float v[Sums::kClassBlocks][8];
            float factor = rate[row];  // exponents are v times this
            float highest = -INFINITY, top = kNoMaximum;
#pragma unroll
            for (int b = 0; b < Sums::kClassBlocks; ++b) {
#pragma unroll
                for (int k = 0; k < 8; ++k) v[b][k] = sums.at(row, b, k);
                to_logits<Options>(v[b], factor, bias[b], parameter[row], tile_call.constants,
                                   scale, top);
#pragma unroll
                for (int k = 0; k < 8; ++k) highest = fmaxf(highest, v[b][k]);
            }
            if constexpr (Options::kBias || Options::kTransformed) factor = 1.0F;
            // a constant factor may be taken out of the maximum
            const float higher = Options::kSave ? offset : fmaxf(stats.m[row], highest * factor);
            float l = stats.l[row];
            if constexpr (!Options::kSave)
                l *= ptx::exp2((stats.m[row] - higher) * Options::kToLog2);
            stats.m[row] = higher;
#pragma unroll
            for (int b = 0; b < Sums::kClassBlocks; ++b)
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const float z = v[b][k];
                    if constexpr (Options::kMore)
                        stats.sum[row] += z == -INFINITY ? 0.0F : z * factor;
                    const float p = ptx::exp2((z * factor - higher) * Options::kToLog2);
                    if constexpr (Options::kSave) sums.at(row, b, k) = p;
                    l += p;
                }
            stats.l[row] = l;
            if constexpr (Options::kOwnMaximum)
                stats.top[row] = fmaxf(stats.top[row], Options::kSave ? highest * factor : top);
        }
        if constexpr (Options::kSave) {
            if (first_row >= call.saved_stride) return;
#pragma unroll
            for (int b = 0; b < Sums::kClassBlocks; ++b)
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    if (first_class + b * 32 + k >= tile_call.c) continue;
                    const float factor = q[b][k] < call.inverse_limit ? q[b][k] : 1.0F;
                    float column[8];
#pragma unroll
                    for (int row = 0; row < 8; ++row) column[row] = sums.at(row, b, k) * factor;
                    store_eight<T>(
                        call.saved,
                        static_cast<int64_t>(first_class + b * 32 + k) * call.saved_stride +
                            first_row,
                        column);
                }
        }
    });

#pragma unroll
    for (int row = 0; row < 8; ++row) {  // four lanes have the same rows
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            const auto other = [&](float value) { return __shfl_xor_sync(~0U, value, lanes); };
            const float m = other(stats.m[row]), l = other(stats.l[row]);
            merge(stats, row, m, l, Options::kMore ? other(stats.sum[row]) : 0.0F,
                  Options::kOwnMaximum ? other(stats.top[row]) : 0.0F);
        }
        if (lane % 4 == 0 && first_row + row < tile_call.n) {
            float* const p = partials + row;
            p[kMaximum * plane] = stats.m[row];
            p[kExponentials * plane] = stats.l[row];
            if constexpr (Options::kMore) p[kLogitSum * plane] = stats.sum[row];
            if constexpr (Options::kOwnMaximum) p[kLogitMaximum * plane] = stats.top[row];
        }
    }
}

}  // namespace marginkernels::cuda
