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

#include "centers.cuh"

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

// What the general case needs of a thread's rows. Rows of x that are not there have zeros.
struct GeneralRows {
    float rate[8], lse[8], a[8], u[8], parameter[8] = {}, scale;

    __device__ __forceinline__ GeneralRows(const GradientCall& call, int first_row, int64_t plane) {
        const float* const rows = call.rows + first_row;
        scale = *call.tile.scale;
        if (call.tile.row_parameter) load_eight(parameter, call.tile.row_parameter + first_row);
        load_eight(rate, rows + kRate * plane);
        load_eight(lse, rows + kShift * plane);
        load_eight(a, rows + kA * plane);
        load_eight(u, rows + kU * plane);
    }
};

// The derivative of the loss by a logit that takes part, and the transform's value and slope.
template <class F>
struct GeneralPair {
    float g, value, slope;

    // `product` is <x_i, w_j> q.
    __device__ __forceinline__ GeneralPair(const GeneralRows& rows, int row, float product,
                                           float bias, const float* constants) {
        const auto made = F::apply(product * rows.rate[row], rows.parameter[row], constants);
        value = made.value;
        slope = made.slope;
        const float row_rate = rows.rate[row] * rows.scale;  // as statistics_rows_kernel makes it
        // a logit has the bits that it had in the statistics: its error is one of exp(z - lse)
        const float z = std::is_same_v<F, mk::Identity> ? ptx::fma(product, row_rate, bias)
                                                        : rows.scale * value + bias;
        float p;
        if constexpr (F::kOneVersusRest) {
            p = softplus(z).slope;
        } else {
            p = ptx::exp2((z - rows.lse[row]) * kLog2E);
        }
        g = rows.a[row] * p + rows.u[row];
    }
};

// The general case, with every option: a transform, a bias, gradients of the bias and of the scale.
// G of the excluded, whose products are -inf, is 0.
template <class F, class Tile>
__device__ __forceinline__ void general_gradient(Accumulator<Tile>& sums, const GradientCall& call,
                                                 int first_row, int first_class,
                                                 const float (&q)[8], float (&dbias)[8],
                                                 float& dscale) {
    const TileCall& tile_call = call.tile;
    float bias[8] = {};
    if (tile_call.bias) load_eight(bias, tile_call.bias + first_class);
    const int64_t plane = tile_call.row_tiles * Tile::kRows;
    const GeneralRows rows(call, first_row, plane);
    float fold[8];
    load_eight(fold, call.rows + kFold * plane + first_row);
#pragma unroll
    for (int row = 0; row < 8; ++row) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float& v = sums.at(row, 0, k);
            const bool excluded = v == -INFINITY;
            const GeneralPair<F> pair(rows, row, excluded ? 0.0F : v * q[k], bias[k],
                                      tile_call.constants);
            const float g = excluded ? 0.0F : pair.g;
            dbias[k] += g;
            dscale += g * pair.value;
            v = g * pair.slope * fold[row];
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
        store_classes<T>(sums, class_fold, call.g, call.g_stride, call.g_stride, in_launch,
                         first_row, tile_call.c - first_class);
    });
    if (kGeneral && call.dscale) {
        dscale = sum_over_lanes<1>(dscale);
        if (lane == 0) call.dscale[blockIdx.x * 4 + threadIdx.x / kWarp] = dscale;
    }
}

// Turns the winners' products into G but for the row's and the class's factors. Returns their part
// of dscale.
template <class F, class Tile>
__device__ __forceinline__ float winners_gradient(Winners<Tile>& winners, const GeneralRows& rows,
                                                  const TileCall& call, int first_class) {
    float dscale = 0.0F;
#pragma unroll
    for (int row = 0; row < 8; ++row)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float& v = winners.products.at(row, 0, k);
            float bias = 0.0F;  // a bias comes without a transform
            if (std::is_same_v<F, mk::Identity> && call.bias)
                bias = call.bias[winners.center(row, k, first_class, call.sub_centers)];
            const bool excluded = v == -INFINITY;
            const GeneralPair<F> pair(rows, row, excluded ? 0.0F : v, bias, call.constants);
            const float g = excluded ? 0.0F : pair.g;
            dscale += g * pair.value;
            v = g * pair.slope;
        }
    return dscale;
}

// Writes the gradients of the biases of a warp's classes, where the winners' G have no slope. `to`
// is where the thread's classes begin.
template <class Tile>
__device__ __forceinline__ void write_dbias(Winners<Tile>& winners, int centers, float* to) {
    for (int center = 0; center < centers; ++center) {
        const OfCenter<Tile> g = {winners, center};
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float sum = 0.0F;
#pragma unroll
            for (int row = 0; row < 8; ++row) sum += g.at(row, 0, k);
            sum = sum_over_lanes<4>(sum);
            if (threadIdx.x % kWarp < 4) to[k * centers + center] = sum;
        }
    }
}

// G where classes have several centres, with every option of the general case. Of a row and a class
// only the winner has one; the others' are 0.
template <class T, class Tile, class F>
__global__ void __launch_bounds__(Tile::kThreads) centers_gradient_kernel(const GradientCall call) {
    static_assert(Tile::kRowWarps == 1, "a warp has all rows of its classes");
    const TileCall& tile_call = call.tile;
    const Position<Tile> position;
    const int row_tile = row_tile_of_block(tile_call), centers = tile_call.sub_centers;
    const int first_row = row_tile * Tile::kRows + position.row;
    const int64_t plane = tile_call.row_tiles * Tile::kRows;
    float dscale = 0.0F;

    for_each_tile_of_centers<T>(tile_call, position, [&](Winners<Tile>& winners, int tile) {
        const int first_class = tile * kTileClasses + position.class_;
        const int64_t in_launch = first_class - tile_call.first_tile * kTileClasses;
        for_each_excluded(tile_call, position, tile, [&](int row, int b, int k) {
            winners.products.at(row, b, k) = -INFINITY;
        });
        dscale += winners_gradient<F>(winners, GeneralRows(call, first_row, plane), tile_call,
                                      first_class);
        if constexpr (std::is_same_v<F, mk::Identity>)
            if (call.dbias) {
                const int64_t classes = (tile_call.stop_tile - tile_call.first_tile) * kTileClasses;
                write_dbias(winners, centers,
                            call.dbias + (row_tile * classes + in_launch) * centers);
            }
        float fold[8];
        load_eight(fold, call.rows + kFold * plane + first_row);
#pragma unroll
        for (int row = 0; row < 8; ++row)
#pragma unroll
            for (int k = 0; k < 8; ++k) winners.products.at(row, 0, k) *= fold[row];
        for (int center = 0; center < centers; ++center) {
            float class_fold[1][8];
            load_center(class_fold[0], tile_call.q, first_class, centers, center);
#pragma unroll
            for (float& q : class_fold[0]) q = q < call.inverse_limit ? q : 1.0F;
            OfCenter<Tile> g = {winners, center};
            store_classes<T>(g, class_fold, static_cast<T*>(call.g) + center * call.g_stride,
                             call.g_stride, int64_t{centers} * call.g_stride, in_launch, first_row,
                             tile_call.c - first_class);
        }
    });
    if (call.dscale) {
        dscale = sum_over_lanes<1>(dscale);
        if (threadIdx.x % kWarp == 0) call.dscale[blockIdx.x * 4 + threadIdx.x / kWarp] = dscale;
    }
}

}  // namespace marginkernels::cuda
