// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The backward sweep: G of a chunk of classes, recomputed by the tile program.
//
// What: G_ij = (a_i exp(z_ij - lse_i) + u_i) slope_ij r_i q_j of the negatives, 0 at the targets,
// or with sigmoid(z_ij) for the exponential where a transform is one versus rest.
// It has the compute type, and a class's rows next to each other, as the vendor's GEMMs read it.
// Never materialised: logits, exponentials, G of more than the chunk. Fast because: a logit takes
// five instructions, the numbers of a row or a class are loaded 16 bytes at a time, and eight rows
// of a class leave in one store.

#pragma once

#include <type_traits>

#include "tile.cuh"

namespace marginkernels::cuda {

// The plain case: G is a 2^(v q rate - shift) + u, but for the class's factor.
template <class Tile>
__device__ __forceinline__ void plain_gradient(Accumulator<Tile>& sums, const GradientCall& call,
                                               int first_row, int b, const float (&q)[8]) {
    const float* const rows = call.rows + first_row;
    const int64_t plane = call.tile.row_tiles * Tile::kRows;
    float rate[8], shift[8], a[8], u[8];
    load_eight(rate, rows + kRate * plane);
    load_eight(shift, rows + kShift * plane);
    load_eight(a, rows + kA * plane);
    load_eight(u, rows + kU * plane);
#pragma unroll
    for (int row = 0; row < 8; ++row)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float& v = sums.at(row, b, k);
            v = a[row] * ptx::exp2(v * q[k] * rate[row] - shift[row]) + u[row];
        }
}

// The general case, with every option: a transform, a bias, gradients of the bias and of the scale.
// G of the excluded, whose products are -inf, is 0.
template <class F, class Tile>
__device__ __forceinline__ void general_gradient(Accumulator<Tile>& sums, const GradientCall& call,
                                                 int first_row, int first_class,
                                                 const float (&q)[8], float (&dbias)[8],
                                                 float& dscale) {
    const TileCall& tile_call = call.tile;
    const float* const rows = call.rows + first_row;
    const int64_t plane = tile_call.row_tiles * Tile::kRows;
    const float scale = *tile_call.scale;
    float bias[8] = {}, rate[8], lse[8], a[8], u[8], row_fold[8], parameter[8] = {};
    if (tile_call.bias) load_eight(bias, tile_call.bias + first_class);
    if (tile_call.row_parameter) load_eight(parameter, tile_call.row_parameter + first_row);
    load_eight(rate, rows + kRate * plane);
    load_eight(lse, rows + kShift * plane);
    load_eight(a, rows + kA * plane);
    load_eight(u, rows + kU * plane);
    load_eight(row_fold, rows + kFold * plane);
#pragma unroll
    for (int row = 0; row < 8; ++row) {
        const float row_rate = rate[row] * scale;  // as statistics_rows_kernel makes it
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float& v = sums.at(row, 0, k);
            const bool excluded = v == -INFINITY;
            const float product = excluded ? 0.0F : v * q[k];
            const auto made = F::apply(product * rate[row], parameter[row], tile_call.constants);
            // a logit has the bits that it had in the statistics: its error is one of exp(z - lse)
            const float z = std::is_same_v<F, mk::Identity> ? ptx::fma(product, row_rate, bias[k])
                                                            : scale * made.value + bias[k];
            float p;
            if constexpr (F::kOneVersusRest) {
                p = softplus(z).slope;
            } else {
                p = ptx::exp2((z - lse[row]) * kLog2E);
            }
            float g = a[row] * p + u[row];
            g = excluded ? 0.0F : g;
            dbias[k] += g;
            dscale += g * made.value;
            v = g * made.slope * row_fold[row];
        }
    }
}

// Returns the sum over the lanes that are kFirst apart, twice kFirst apart, and so on.
template <int kFirst>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int lanes = kFirst; lanes < kWarp; lanes *= 2) value += __shfl_xor_sync(~0U, value, lanes);
    return value;
}

template <class T, class Tile, class F, bool kGeneral>
__global__ void __launch_bounds__(Tile::kThreads) gradient_kernel(const GradientCall call) {
    using Sums = Accumulator<Tile>;
    static_assert(!kGeneral || (Sums::kClassBlocks == 1 && Tile::kRowWarps == 1),
                  "a warp has all rows of its classes");
    const TileCall& tile_call = call.tile;
    const Position<Tile> position;
    const int row_tile = row_tile_of_block(tile_call), lane = threadIdx.x % kWarp;
    const int first_row = row_tile * Tile::kRows + position.row;
    float dscale = 0.0F;

    for_each_tile<T>(tile_call, position, [&](Sums& sums, int tile) {
        const int first_class = tile * kTileClasses + position.class_;
        const int64_t in_launch = first_class - tile_call.first_tile * kTileClasses;
        float class_fold[Sums::kClassBlocks][8];
        if constexpr (kGeneral)
            for_each_excluded(tile_call, position, tile,
                              [&](int row, int b, int k) { sums.at(row, b, k) = -INFINITY; });
#pragma unroll
        for (int b = 0; b < Sums::kClassBlocks; ++b) {
            float q[8], dbias[8] = {};
            load_eight(q, tile_call.q + first_class + b * 32);
#pragma unroll
            for (int k = 0; k < 8; ++k) class_fold[b][k] = q[k] < call.inverse_limit ? q[k] : 1.0F;
            if constexpr (kGeneral) {
                general_gradient<F>(sums, call, first_row, first_class, q, dbias, dscale);
                if (call.dbias == nullptr) continue;
                const int64_t classes = (tile_call.stop_tile - tile_call.first_tile) * kTileClasses;
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const float sum = sum_over_lanes<4>(dbias[k]);
                    if (lane < 4) call.dbias[row_tile * classes + in_launch + k] = sum;
                }
            } else {
                plain_gradient(sums, call, first_row, b, q);
            }
        }
        if constexpr (!kGeneral)
            for_each_excluded(tile_call, position, tile,
                              [&](int row, int b, int k) { sums.at(row, b, k) = 0.0F; });
        store_classes<T>(sums, class_fold, call.g, call.g_stride, in_launch, first_row,
                         tile_call.c - first_class);
    });
    if (kGeneral && call.dscale) {
        dscale = sum_over_lanes<1>(dscale);
        if (lane == 0) call.dscale[blockIdx.x * 4 + threadIdx.x / kWarp] = dscale;
    }
}

}  // namespace marginkernels::cuda
