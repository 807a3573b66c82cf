// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Declares what the schedule (operands.cpp, forward.cpp, backward.cpp) needs of the kernels: shapes
// of tiles, the arguments of each launch, and the launchers. Neither ATen nor CUDA headers are
// needed to read it.
//
// Sizes are ints, and offsets are computed in 64 bits. Rows of x and w are `width` numbers wide: D
// numbers, then zeros up to a multiple of what a kernel reads at once. "A" is the type of
// statistics, float or double; a void* points to the compute type unless its comment names another.
// tile.cuh explains the short names of the tile kernels.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../loss.h"
#include "../numerics.h"
#include "../transforms.h"
#include "../update.h"

struct CUstream_st;

namespace marginkernels::cuda {

using Stream = CUstream_st*;

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16 };
using mk::kNoMaximum;
using mk::Transform;

constexpr int kWarp = 32;

// Blocks of 128 threads per multiprocessor that kernels which wait for memory are planned for. The
// compiler may give a thread as many registers as leave room for them.
constexpr int kRowBlocksPerSm = 4;
constexpr double kLn2 = 0.69314718055994531;
constexpr float kLog2E = 1.44269504088896341F;

constexpr int kTileFeatures = 32;  // of a step of the tile program's main loop

// A tile of rows x classes: four warps beside each other, each with 64 rows.
template <int kRowWarps_, int kWarpClasses_>
struct Tile {
    static constexpr int kRowWarps = kRowWarps_, kWarpClasses = kWarpClasses_;
    static constexpr int kThreads = 4 * kWarp;
    static constexpr int kClassWarps = 4 / kRowWarps;
    static constexpr int kRows = kRowWarps * 64, kClasses = kClassWarps * kWarpClasses;
    static constexpr int kStageBytes = (kRows + kClasses) * kTileFeatures * 2;
    static constexpr int kBlocksPerSm = 2;
};

// The tile with most work per byte of shared memory that fits the registers.
using BigTile = Tile<2, 64>;
// The tile for few rows, and for epilogues that need more registers: a transform, a bias, the
// maximum beside saved exponentials, gradients of the bias and of the scale.
using SmallTile = Tile<1, 32>;

constexpr int kTileClasses = 128;  // of both
static_assert(BigTile::kClasses == kTileClasses && SmallTile::kClasses == kTileClasses);

constexpr int kMostTileCenters = 256;  // of a class: the tile program keeps their numbers in bytes

// Stages of the copy pipeline: as many as leave room for a second block.
constexpr int kMostStages = 4, kFewestStages = 3;

// The arguments that both tile kernels share.
struct TileCall {
    const void* x;               // (row tiles * rows of a tile, width), zeros from N on
    const void* w;               // (., width): the classes of this launch, all their centres
    const int64_t* y;            // (targets, N), -1: no target here
    const uint8_t* flags;        // (row tiles, flag_stride): see TargetTiles
    const float* q;              // (class tiles * kTileClasses,) 1 / |w_j|, or 1
    const float* bias;           // (class tiles * kTileClasses,) or null
    const float* scale;          // ()
    const float* row_parameter;  // (row tiles * rows of a tile,) or null: of the transform
    const float* constants;      // (K,) or null: of the transform
    int n, c;
    int targets;      // of a row
    int sub_centers;  // of a class: w, q, bias, G and dbias have so many rows for each
    int steps;        // width / kTileFeatures
    int row_tiles, flag_stride;
    int first_tile, stop_tile;  // the class tiles of this launch
    int columns;                // blocks per row tile
    int stages;
};

// Planes of (partials, N) that hold the partial statistics: the maximum and the sum of
// exponentials, the sum and the maximum of the logits.
constexpr int kMaximum = 0, kExponentials = 1, kLogitSum = 2, kLogitMaximum = 3, kPlanes = 4;

struct StatisticsCall {
    TileCall tile;
    bool want_sum, want_max;  // which variant to launch
    const float* rate;        // (padded rows,): see statistics_rows_kernel
    float* partials;          // (kPlanes, columns * class warps, N)
    bool carry;               // continue from the partials of the launch before
    void* tiles;              // (C, tiles_stride) exp(z - offset) q_j, or null
    int tiles_stride;         // N up to a multiple of 16
    float inverse_limit;      // 1 / norm of a zero row
};

// Planes of (padded rows,) that the gradient's epilogue reads.
constexpr int kRate = 0, kShift = 1, kA = 2, kU = 3, kFold = 4, kGradientPlanes = 5;

struct GradientCall {
    TileCall tile;
    bool general;       // which variant: a transform, a bias, its gradient or the scale's
    const float* rows;  // (kGradientPlanes, padded rows): see gradient_rows_kernel
    float inverse_limit;
    void* g;        // (classes of this launch, g_stride)
    int g_stride;   // N up to a multiple of 16
    float* dbias;   // (row tiles, classes of this launch up to whole tiles) sums, or null
    float* dscale;  // (4 * blocks,) sums, or null
};

struct TileVariant {
    Type type;  // kBFloat16 or kFloat16
    bool small;
    Transform transform;
};

// Each launcher is named after its kernel.

void launch_statistics(const StatisticsCall&, const TileVariant&, Stream);
void launch_gradient(const GradientCall&, const TileVariant&, Stream);

// rows.cu:

// Rows as a tensor stores them.
struct StoredRows {
    const void* data;
    const int64_t* index;  // which rows, or null: from the first one on
    int64_t stride;        // from row to row
    int d;
    Type type;
    bool vectors;  // four numbers can be read at once
};

// Writes 1 / |row| of `rows` (count, width) into `inverse` (padded,) of A.
void launch_norm(const void* rows, void* inverse, int64_t count, int64_t padded, int width,
                 double inverse_limit, Type, Stream);

struct RoundCall {
    StoredRows from;
    void* out;      // (out_rows, width), zeros from d on and in rows from `count` on
    void* inverse;  // (inverse_rows,) A: 1 / |row| as rounded, or null
    int64_t count, out_rows, inverse_rows;
    int width;
    double inverse_limit;
};
void launch_round(const RoundCall&, Type, Stream);

constexpr int kFlagBits = 8;

// Which class tiles hold a target of a row tile: bit l % kFlagBits of the flag stands for the l-th
// target of the rows.
struct TargetTiles {
    const int64_t* y;  // (targets, N)
    uint8_t* flags;    // (row tiles, stride), written
    int n, targets, tile_rows;
    int stride;  // the class tiles, up to a multiple of 16
};

struct StatisticsRowsCall {
    TargetTiles targets;
    const float *x_inv, *scale;  // (N,), ()
    float* rate;                 // (padded rows,)
    float per_unit;
    bool with_scale;
};
void launch_statistics_rows(const StatisticsRowsCall&, int row_tiles, Stream);

struct GradientRowsCall {
    TargetTiles targets;
    const float *x_inv, *scale, *lse, *grad_lse;  // (N,), (), (N,), (N,)
    const float *grad_sum, *g_scale;              // (N,) or null, () or null
    float* planes;                                // (kGradientPlanes, padded rows)
    float inverse_limit;
    bool general;
};
void launch_gradient_rows(const GradientRowsCall&, int row_tiles, Stream);

struct FinishRowsCall {
    const void* x;  // (N, width)
    StoredRows w;
    const int64_t* y;              // (targets, N)
    const void* x_inv;             // (N,) A
    const void* w_inv;             // (C,) A
    const void* partials;          // (kPlanes, partials_per_row, N) A
    void* lse;                     // (N,) A
    void *target_cosine, *w_norm;  // (N, targets) A
    void *logit_sum, *logit_max;   // (N,) A, or null
    int n, targets, width, partials_per_row;
    int maximum_plane;  // kMaximum or kLogitMaximum
    bool normalize_w, log2_units, one_versus_rest;
};
void launch_finish_rows(const FinishRowsCall&, Type, Stream);

// A pair is a row of x and one of its targets, by targets and then by rows: pair p has row p % N.
// There are P = targets N.
struct TargetCall {
    const void* x;  // (N, width)
    StoredRows w;
    const int64_t* y;                   // (P,)
    const int64_t *sorted, *order;      // (P,) labels and pairs by label, or null
    const void *x_inv, *w_inv, *scale;  // (N,), (C,), () A
    const void* grad_target;            // (P,) A
    const void* grad_w_norm;            // (P,) A, or null
    void* dx;                           // (P, width) A: a pair's part of dx, zeros without a target
    int* slot;     // (C,): the pair whose sums are those of a class, of classes with a target only
    void* sums;    // (P, width) A: the targets' part of a class's dw
    void* radial;  // (P,) A: the gradient of the class's norm, or null
    int pairs, n, width;
    bool normalize_w;
};
void launch_target(const TargetCall&, Type, Stream);

// A gradient along unit rows as the GEMMs leave it, and what has to be added.
struct RawGradient {
    const void* sums;     // (count, width) A
    const void* inverse;  // (count,) A: 1 / norm of the rows
    const void* factor;   // of the sums: (count,) or () A, or null
    const int* slot;      // (count,) row of the table that is added, or null: its own
    const int64_t* y;     // (pairs,): a slot counts where its pair has the class as label
    int pairs;
    int64_t first;       // class
    const void* table;   // (., width) A
    const void* radial;  // by row of the table: gradient of the row's norm, A, or null
    int width;
    int factor_stride;  // 0: one factor for all rows
    double inverse_limit;
    bool normalize;
};

struct ProjectCall {
    RawGradient raw;
    const void* rows;      // (count, width)
    const int64_t* index;  // (count,) where rows of the result go, or null
    void* out;             // (., d) of type `out_type`; may be the sums, where width is d
    int64_t count;
    int d;
    Type out_type;
    bool vectors;  // four numbers of the result can be written at once
};

// project.cu:

void launch_project(const ProjectCall&, Type, Stream);

// update.cu:

struct UpdateCall {
    RawGradient raw;               // of rows of w
    void* sums;                    // the sums of `raw`, whose memory the kernel uses
    void* w;                       // (., d)
    void* state[mk::kMostStates];  // (., d) each
    void* row_state;               // (.,) A, or null
    void* w_inv;                   // (count,) A
    const int64_t* index;   // (count,) the rows of w and of the states, or null: from `first` on
    const void* numbers;    // (kUpdateNumbers,) A: see numerics.h
    const int64_t* random;  // (2,) seed and step
    int64_t count, first;
    int64_t first_class;  // of all ranks, that row 0 of w is
    int d;
    Type compute;  // to which the norms round
    bool project;
    bool vectors;  // rows can be read and written four numbers at a time
};

struct UpdateVariant {
    bool fp64;      // A is double
    Type w, state;  // kFloat32 or kBFloat16; with fp64 kFloat64
    mk::Rule rule;
};

void launch_update(const UpdateCall&, const UpdateVariant&, Stream);

// dense.cu:

// Dot products of a chunk of classes, as a GEMM left them. "A" is the compute type too.
struct DenseCall {
    void* products;             // (classes, stride) A
    int64_t stride;             // N or more
    const int64_t* y;           // (targets, N)
    const void* x_inv;          // (N,) A
    const void* q;              // (classes,) A, or null for 1
    const void* bias;           // (classes,) A, or null
    const void* scale;          // () A
    const void* row_parameter;  // (N,) A, or null
    const void* constants;      // (K,) A, or null
    double inverse_limit;
    int n, classes, targets;
    int sub_centers;  // of a class: products, q and bias have so many rows for each
    int64_t first_class;
};

struct DenseStatisticsCall {
    DenseCall chunk;
    void* partials;  // (kPlanes, slices, N) A
    int row_blocks, slices;
    bool carry;
    bool save_tiles;  // exp(z - offset) q_j in the place of the products
};

struct DenseGradientCall {
    DenseCall chunk;
    const void *lse, *grad_lse, *grad_sum;  // (N,) A, the last one may be null
    const int* slot;                        // (classes,): see TargetCall
    void *dbias, *dscale;                   // (classes,) A, or null
};

constexpr int kDenseRows = 128;  // of a block of dense_statistics_kernel

void launch_dense_statistics(const DenseStatisticsCall&, Transform, Type, Stream);
void launch_dense_gradient(const DenseGradientCall&, Transform, Type, Stream);

// loss.cu:

void launch_loss(const mk::LossCall<float>&, Stream);
void launch_loss(const mk::LossCall<double>&, Stream);

// Writes the place of each label (n,) among `count` classes from `first` on, or -1.
void launch_held(const int64_t* labels, int64_t* held, int64_t n, int64_t first, int64_t count,
                 int64_t ignore_index, Stream);

// device.cu:

int multiprocessors();        // of the current device
int stages_per_block();       // of the tile program's pipeline on the current device
int cuda_version();           // that the kernels were compiled with, 13000 for 13.0
const char* architectures();  // that the kernels were compiled for, "800,860"
// Returns why the kernels cannot be launched on a device, in CUDA's words, or nothing.
std::string failure(int device);

}  // namespace marginkernels::cuda
