// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The tile program: <x_i, w_j> of a rows x classes tile, in the registers of a block's four warps.
//
// What: a block walks over every `columns`-th class tile of one row tile and hands each to an
// epilogue. Never materialised: the logits. Fast because: tensor cores take 16-bit operands from
// shared memory that copies fill several steps ahead, also across tiles, with one barrier a step;
// blocks that run together read one tile of w, which stays in L2.
//
// Rows of shared memory are 64 bytes, 32 features; their 16-byte parts are swizzled, so that
// neither copies nor ldmatrix meet a bank conflict. Rows and classes lie there in an order in which
// mma leaves a thread with 8 neighbouring rows and 8 neighbouring classes (at 32 from each other):
// all it reads and writes per row or class is 16 bytes wide, without a shuffle.
//
// Names in the epilogues, as in marginkernels/backends/triton/tile_kernels.py:
//   i, j         a row of x, and a class
//   q            1 / |w_j|, or 1 where w is not normalised
//   v            <x_i, w_j>; then, in the same registers, times q, the logit, and at last G
//   excluded     pairs that take no part: a row's target, and classes from C on; their v is -inf
//   rate         factor of a row that turns v q into a logit, or before a transform into a cosine
//   unit         of logits: ln 2, so that an exponential is a bare exp2, or 1
//   z, slope     the logit, after the transform where there is one; d value / d cosine
//   offset       constant in the place of m where exponentials are saved
//   m, l         running maximum of z, and sum of exp(z - m)
//   total, top   sum of z, and maximum of the logits before the transform
//   p            exp(z - m), or exp(z - lse)
//   a, u         grad_lse and grad_sum of a row: G = (a p + u) slope fold q; in the plain case the
//                planes of the rows have them times fold already
//   fold         scale / |x_i| as G has it: 1 for a zero row; in fp16 times a power of two
//   class_fold   q as G has it: 1 for a zero row
//   shift        lse of a row in units of ln 2; in the general case lse itself

#pragma once

#include "kernels.h"
#include "ptx.h"

namespace marginkernels::cuda {

constexpr int kSlotBytes = kTileFeatures * 2;  // a row of shared memory

// The row of a warp's 64 that lies in a slot: tile i of 16, half h, lane group g hold row 8 g + 2 i
// + h.
__device__ constexpr int row_of_slot(int slot) {
    return slot / 64 * 64 + slot % 8 * 8 + slot % 64 / 16 * 2 + slot / 8 % 2;
}

// The class of 32 that lies in a slot: tile j of 8, column 2 k + e hold class 8 k + 2 j + e.
__device__ constexpr int class_of_slot(int slot) {
    return slot / 32 * 32 + slot / 2 % 4 * 8 + slot / 8 % 4 * 2 + slot % 2;
}

__device__ constexpr int swizzled(int slot, int part) {
    return slot * kSlotBytes + (part ^ (slot / 2 % 4)) * 16;
}

// The place of a thread in the tile.
template <class Tile>
struct Position {
    int row;     // of its first of 8 neighbouring rows
    int class_;  // of its first of 8 neighbouring classes, the others follow at +32
    int row_warp, class_warp;

    __device__ __forceinline__ Position() {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        row_warp = warp / Tile::kClassWarps;
        class_warp = warp % Tile::kClassWarps;
        row = row_warp * 64 + lane / 4 * 8;
        class_ = class_warp * Tile::kWarpClasses + lane % 4 * 8;
    }
};

// Holds the dot products of a thread: 8 rows, and blocks of 8 classes.
template <class Tile>
struct Accumulator {
    static constexpr int kClassBlocks = Tile::kWarpClasses / 32;
    float c[4][kClassBlocks * 4][4];

    __device__ __forceinline__ float& at(int row, int block, int class_) {
        return c[row / 2][block * 4 + class_ / 2][row % 2 * 2 + class_ % 2];
    }
};

// Copies the operands of one step after the other into the stages of shared memory: of a class tile
// after the other, or of each centre of its classes before.
template <class Tile, bool kSubCenters>
class Loader {
  public:
    __device__ __forceinline__ Loader(const TileCall& call, int row_tile, int column)
        : columns_(call.columns),
          steps_(call.steps),
          step_(0),
          centers_(call.sub_centers),
          center_(0) {
        const int slot = threadIdx.x / 4, part = threadIdx.x % 4;
        shared_ = ptx::shared_memory() + swizzled(slot, part);
        stride_ = static_cast<int64_t>(call.steps) * kSlotBytes;
        class_stride_ = kSubCenters ? stride_ * centers_ : stride_;
        const int64_t row = static_cast<int64_t>(row_tile) * Tile::kRows + row_of_slot(slot);
        x_ = static_cast<const char*>(call.x) + row * stride_ + part * 16;
        const int64_t first = static_cast<int64_t>(column) * kTileClasses + class_of_slot(slot);
        w_ = static_cast<const char*>(call.w) + first * class_stride_ + part * 16;
        const int tile = call.first_tile + column;
        tiles_left_ = tile < call.stop_tile ? (call.stop_tile - 1 - tile) / columns_ + 1 : 0;
        classes_left_ = call.c - tile * kTileClasses - class_of_slot(slot);
    }

    // Starts the copies of the next step, if there is one.
    __device__ __forceinline__ void next(int stage) {
        if (tiles_left_ > 0) {
            const uint32_t to = shared_ + stage * Tile::kStageBytes;
            const int64_t offset = static_cast<int64_t>(step_) * kSlotBytes;
#pragma unroll
            for (int k = 0; k < Tile::kRows / 32; ++k)  // 32 slots further on, see row_of_slot
                ptx::copy_async(to + k * 32 * kSlotBytes,
                                x_ + offset + (k / 2 * 64 + k % 2 * 4) * stride_, true);
#pragma unroll
            for (int k = 0; k < kTileClasses / 32; ++k)  // classes that are not there are zeros
                ptx::copy_async(to + (Tile::kRows + k * 32) * kSlotBytes,
                                w_ + offset + k * 32 * class_stride_, k * 32 < classes_left_);
            if (++step_ == steps_) {
                step_ = 0;
                if (next_center()) {
                    --tiles_left_;
                    w_ += columns_ * kTileClasses * class_stride_;
                    classes_left_ -= columns_ * kTileClasses;
                }
            }
        }
        ptx::commit_async();
    }

  private:
    const char *x_, *w_;
    int64_t stride_, class_stride_;
    uint32_t shared_;
    int columns_, steps_, step_, centers_, center_, tiles_left_, classes_left_;

    // Goes on to the classes' next centre. Returns whether that is the first one again.
    __device__ __forceinline__ bool next_center() {
        if constexpr (kSubCenters) {
            w_ += stride_;
            if (++center_ < centers_) return false;
            center_ = 0;
            w_ -= class_stride_;
        }
        return true;
    }
};

// Knows where a thread reads its warp's operands in a stage, for ldmatrix.
template <class Tile>
struct Fragments {
    uint32_t x, w;

    __device__ __forceinline__ Fragments(const Position<Tile>& position) {
        const int lane = threadIdx.x % kWarp;
        const uint32_t base = ptx::shared_memory();
        x = base + swizzled(position.row_warp * 64 + lane % 16, lane / 16);
        const int slot = position.class_warp * Tile::kWarpClasses + lane / 16 * 8 + lane % 8;
        w = base + Tile::kRows * kSlotBytes + swizzled(slot, lane / 8 % 2);
    }

    // Adds the products of a stage's 32 features.
    template <class T>
    __device__ __forceinline__ void multiply_add(Accumulator<Tile>& sums, int stage) const {
        constexpr int kTilesOf8 = Tile::kWarpClasses / 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 16 features: parts 2 and 3 are 0 and 1, xor 2
            const uint32_t x_half = (x ^ half * 32) + stage * Tile::kStageBytes;
            const uint32_t w_half = (w ^ half * 32) + stage * Tile::kStageBytes;
            uint32_t rows[4][4], classes[kTilesOf8][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) ptx::load_matrices(rows[i], x_half + i * 16 * kSlotBytes);
#pragma unroll
            for (int j = 0; j < kTilesOf8; j += 2) {
                uint32_t pair[4];
                ptx::load_matrices(pair, w_half + j * 8 * kSlotBytes);
                classes[j][0] = pair[0], classes[j][1] = pair[1];
                classes[j + 1][0] = pair[2], classes[j + 1][1] = pair[3];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < kTilesOf8; ++j)
                    ptx::multiply_add<T>(sums.c[i][j], rows[i], classes[j]);
        }
    }
};

// Row tiles vary fastest over blocks: blocks that run together share their tile of w in L2.
__device__ __forceinline__ int row_tile_of_block(const TileCall& call) {
    return blockIdx.x % call.row_tiles;
}
__device__ __forceinline__ int column_of_block(const TileCall& call) {
    return blockIdx.x / call.row_tiles;
}

// The main loop, and its place in the stages from one tile, or centre, to the next.
template <class T, class Tile, bool kSubCenters>
class Products {
  public:
    __device__ __forceinline__ Products(const TileCall& call, const Position<Tile>& position)
        : call_(call),
          loader_(call, row_tile_of_block(call), column_of_block(call)),
          fragments_(position),
          stage_(0),
          last_(call.stages - 1) {
        for (int stage = 0; stage < call.stages - 1; ++stage) loader_.next(stage);
    }

    // Adds the products of all features of the next classes.
    __device__ __forceinline__ void add_to(Accumulator<Tile>& sums) {
        for (int step = 0; step < call_.steps; ++step) {
            // all stages but the last ones have landed, for this thread and then for all
            if (call_.stages == kMostStages) {
                ptx::wait_async<kMostStages - 2>();
            } else {
                ptx::wait_async<kFewestStages - 2>();
            }
            __syncthreads();
            loader_.next(last_);  // the stage that all have read before the barrier
            fragments_.template multiply_add<T>(sums, stage_);
            last_ = stage_;
            stage_ = stage_ + 1 == call_.stages ? 0 : stage_ + 1;
        }
    }

  private:
    const TileCall& call_;
    Loader<Tile, kSubCenters> loader_;
    const Fragments<Tile> fragments_;
    int stage_, last_;
};

// Calls epilogue(sums, class tile) for each class tile of this block.
template <class T, class Tile, class Epilogue>
__device__ __forceinline__ void for_each_tile(const TileCall& call, const Position<Tile>& position,
                                              Epilogue&& epilogue) {
    Products<T, Tile, false> products(call, position);
    for (int tile = call.first_tile + column_of_block(call); tile < call.stop_tile;
         tile += call.columns) {
        Accumulator<Tile> sums = {};
        products.add_to(sums);
        epilogue(sums, tile);
    }
    ptx::wait_async<0>();
}

// Calls f(row, block, class) for a thread's excluded pairs. Only a tile that holds a target of
// these rows, or ends beyond the last class, needs that.
template <class Tile, class F>
__device__ __forceinline__ void for_each_excluded(const TileCall& call,
                                                  const Position<Tile>& position, int tile, F&& f) {
    const int64_t row_tile = row_tile_of_block(call);
    const bool ends = (tile + 1) * kTileClasses > call.c;
    const unsigned flags = ends ? ~0U : call.flags[row_tile * call.flag_stride + tile];
    if (flags == 0) return;
    const int first_class = tile * kTileClasses + position.class_;
    const int first_row = row_tile_of_block(call) * Tile::kRows + position.row;
    for (int l = 0; l < call.targets; ++l) {
        if ((flags >> l % kFlagBits & 1) == 0) continue;
        const int64_t* const labels = call.y + l * int64_t{call.n};
#pragma unroll
        for (int row = 0; row < 8; ++row) {
            const int64_t label = first_row + row < call.n ? labels[first_row + row] : -1;
            const int target = static_cast<int>(label) - first_class;
#pragma unroll
            for (int block = 0; block < Accumulator<Tile>::kClassBlocks; ++block)
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (target == block * 32 + k || first_class + block * 32 + k >= call.c)
                        f(row, block, k);
        }
    }
}

// Returns log(1 + exp(z)) and its derivative.
__device__ __forceinline__ mk::Softplus<float> softplus(float z) {
    return mk::softplus(z, ptx::exp2(-fabsf(z) * kLog2E));
}

// Loads eight numbers of neighbouring rows or classes.
__device__ __forceinline__ void load_eight(float (&to)[8], const float* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto four = reinterpret_cast<const Four<float>*>(from)[half];
#pragma unroll
        for (int k = 0; k < 4; ++k) to[half * 4 + k] = four.v[k];
    }
}

// Stores a thread's rows of its classes, times a factor per class, rounded. In memory the `rows` of
// a class lie next to each other, `stride` from the rows of the next one. `classes` exist.
template <class T, class Sums>
__device__ __forceinline__ void store_classes(Sums& sums,
                                              const float (&factor)[Sums::kClassBlocks][8],
                                              void* to, int64_t rows, int64_t stride,
                                              int64_t first_class, int first_row, int classes) {
    if (first_row >= rows) return;
#pragma unroll
    for (int b = 0; b < Sums::kClassBlocks; ++b)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (b * 32 + k >= classes) continue;
            Four<uint32_t> packed;
#pragma unroll
            for (int pair = 0; pair < 4; ++pair)
                packed.v[pair] = ptx::pack<T>(sums.at(2 * pair, b, k) * factor[b][k],
                                              sums.at(2 * pair + 1, b, k) * factor[b][k]);
            T* const place = static_cast<T*>(to) + (first_class + b * 32 + k) * stride + first_row;
            *reinterpret_cast<Four<uint32_t>*>(place) = packed;
        }
}

}  // namespace marginkernels::cuda
