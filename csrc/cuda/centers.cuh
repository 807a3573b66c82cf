// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The tile program where a class has several centres, `sub_centers` neighbouring rows of w.
//
// What: for each row and class the greatest q <x_i, w_j> of the class's centres, and which of them
// it is. Never materialised: the other centres' products. Fast because: a thread has one centre of
// its classes after the other in the same accumulators, so that it needs room for no more than two
// and a byte for the number of the first.

#pragma once

#include "tile.cuh"

namespace marginkernels::cuda {

// Loads a number of one centre of eight neighbouring classes.
__device__ __forceinline__ void load_center(float (&to)[8], const float* from, int64_t first_class,
                                            int centers, int center) {
#pragma unroll
    for (int k = 0; k < 8; ++k) to[k] = from[(first_class + k) * centers + center];
}

// The centres that stand for a thread's classes.
template <class Tile>
struct Winners {
    using Sums = Accumulator<Tile>;
    static_assert(Sums::kClassBlocks == 1, "registers hold no two accumulators of a larger tile");
    Sums products;           // times q; what epilogues make of them, too
    uint32_t numbers[8][2];  // a byte for each class

    // Has the next centre's products compete; the first of equals stays.
    __device__ __forceinline__ void add(Sums& sums, const float (&q)[8], int center) {
#pragma unroll
        for (int row = 0; row < 8; ++row)
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float product = sums.at(row, 0, k) * q[k];
                uint32_t& four = numbers[row][k / 4];
                if (center > 0 && !(product > products.at(row, 0, k))) continue;
                products.at(row, 0, k) = product;
                four = (four & ~(0xFFU << k % 4 * 8)) | static_cast<uint32_t>(center) << k % 4 * 8;
            }
    }

    __device__ __forceinline__ int number(int row, int k) const {
        return static_cast<int>(numbers[row][k / 4] >> k % 4 * 8 & 0xFFU);
    }

    // Returns the winner's place among all centres of all classes.
    __device__ __forceinline__ uint32_t center(int row, int k, int first_class, int centers) const {
        return static_cast<uint32_t>(first_class + k) * centers + number(row, k);
    }
};

// What is left of the products for one centre: 0 where another one stands for the class.
template <class Tile>
struct OfCenter {
    static constexpr int kClassBlocks = 1;
    Winners<Tile>& winners;
    int center;

    __device__ __forceinline__ float at(int row, int, int k) const {
        return winners.number(row, k) == center ? winners.products.at(row, 0, k) : 0.0F;
    }
};

// Calls epilogue(winners, class tile) for each class tile of this block.
template <class T, class Tile, class Epilogue>
__device__ __forceinline__ void for_each_tile_of_centers(const TileCall& call,
                                                         const Position<Tile>& position,
                                                         Epilogue&& epilogue) {
    Products<T, Tile, true> products(call, position);
    for (int tile = call.first_tile + column_of_block(call); tile < call.stop_tile;
         tile += call.columns) {
        Winners<Tile> winners = {};
        for (int center = 0; center < call.sub_centers; ++center) {
            Accumulator<Tile> sums = {};
            products.add_to(sums);
            float q[8];
            load_center(q, call.q, tile * kTileClasses + position.class_, call.sub_centers, center);
            winners.add(sums, q, center);
        }
        epilogue(winners, tile);
    }
    ptx::wait_async<0>();
}

}  // namespace marginkernels::cuda
