// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Holds the operands of both sweeps as the kernels read them, and hands out w chunk by chunk.
//
// Nothing here reads a number from the device, and launches depend on shapes alone: all ops can be
// captured in a CUDA graph. Workspaces are tensors of PyTorch's caching allocator. Chunks are
// large, because a launch costs the host as long as a small kernel runs, and a GEMM needs tens of
// thousands of classes to run well.

#pragma once

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "ops.h"

namespace marginkernels::cuda {

// The unit of workspace sizes, and the pairs above which those of a class are found by a sort,
// which is several launches. On the host both are small, so that tests meet several chunks and the
// sort.
#if defined(MK_ON_HOST)
constexpr int64_t kMiB = 1 << 8;
constexpr int64_t kMostScannedPairs = 32;
#else
constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kMostScannedPairs = 4096;
#endif

// The dot products of a chunk of classes in fp32 or fp64, which should still be in L2 when they are
// read.
constexpr int64_t kProductChunkBytes = 16 * kMiB;
// What the backward sweep has of a chunk: G, dw before its projection, rounded rows of w.
constexpr int64_t kBackwardChunkBytes = 512 * kMiB;

// Returns the stream that is current on the device of x.
Stream current_stream(const Tensor& x);

// The arguments that all ops are called with.
struct SharedArguments {
    Tensor x, w, y;        // (N, D), (C, D), (N,) or (N, targets)
    Tensor scale;          // ()
    OptionalTensor bias;   // (classes,)
    OptionalTensor index;  // (classes,) the rows of w that are the classes, or all
    bool normalize_w;
    at::ScalarType compute;
    c10::string_view transform;
    OptionalTensor row_parameter, constants;  // (N,), (K,)
    OptionalTensor w_rounded = {};            // (classes, D) the rows of the classes, or none
    bool keep_rounded = false;                // whether w_rounded is to be made
    int64_t sub_centers = 1;
};

inline int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}
inline int64_t round_up(int64_t value, int64_t multiple) {
    return ceil_div(value, multiple) * multiple;
}

// Returns (N,) or (N, targets) numbers by targets, then by rows.
inline Tensor by_target(const Tensor& t) {
    return (t.dim() == 1 ? t : t.t()).contiguous().view(-1);
}

// Kernels take null for a tensor that is not there.
inline const void* pointer(const OptionalTensor& t) {
    return t.has_value() ? t->const_data_ptr() : nullptr;
}
inline const float* floats(const Tensor& t) {
    return t.const_data_ptr<float>();
}
inline const float* floats(const OptionalTensor& t) {
    return t.has_value() ? floats(*t) : nullptr;
}

Type type_of(at::ScalarType type, const char* name);

// Whether four numbers of each row can be read at once, wherever the row lies.
bool has_vectors(const Tensor& rows);

// Returns how many classes, in whole tiles, each chunk but the last one has: as many as `bytes`
// hold, and not more than evens chunks out.
int64_t chunk_of(int64_t classes, int64_t bytes, int64_t bytes_per_class);

// Returns how many blocks share the class tiles of a row tile, such that the last wave of blocks,
// `slots` of which run at once, is nearly full.
int64_t columns_of(int64_t slots, int64_t row_tiles, int64_t class_tiles);

// The operands of one pass over the classes.
//
// Rows are `width` numbers wide for the kernels: D up to a multiple of what a kernel reads at once,
// zeros from D on. So no load has a mask, and every row starts at a multiple of 16 bytes. 16-bit
// types go through the tile program, the others through the vendor's GEMM.
class Operands {
  public:
    Operands(const SharedArguments&, bool needs_small_tiles);

    Stream stream;
    Type type;
    Transform transform;
    at::ScalarType compute;
    bool one_versus_rest;  // how the transform brings the logits of a row together
    bool tiled;            // whether the tile program runs
    bool small;            // whether it runs with small tiles
    bool normalize_w;
    double inverse_limit;    // 1 / norm of a zero row
    int64_t n, c, d, width;  // c rows of w take part: all, or those of the index
    int64_t targets;         // of a row
    int64_t sub_centers;     // how many neighbouring rows of w are a class
    int64_t rows;            // N up to a multiple of the tile's
    int64_t classes;         // c up to a multiple of the tile's, with all centres
    int64_t tile_rows;
    Tensor x;                                 // (rows, width) in the compute type, zeros from N on
    Tensor y, scale;                          // (pairs,), ()
    Tensor target_classes;                    // (pairs,): the classes in which the rows y of w lie
    OptionalTensor bias, index;               // (classes,), (c,)
    OptionalTensor row_parameter, constants;  // (rows,), (K,)
    Tensor w_rounded;  // (c, D), filled chunk by chunk where it is to be kept, else (0,)

    int64_t pairs() const { return n * targets; }  // of a row and a target, see TargetCall
    int64_t row_tiles() const { return rows / tile_rows; }
    int64_t class_tiles() const { return tiles_of(classes); }
    // Whether a chunk of w has to be written before kernels can read it.
    bool rounds_w() const { return !w_is_readable_; }

    // Allocates on the device. Statistics are fp32, or fp64 where that is the compute type.
    Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const;
    Tensor statistics(at::IntArrayRef sizes) const;

    // Rounds x, and writes 1 / |row| into `inverse` (N,) where it is given. Comes before all that
    // reads x.
    void read_x(const OptionalTensor& inverse);

    // Returns how many classes a chunk has, of which each takes so many bytes beside its rounded
    // row.
    int64_t chunk_classes(int64_t bytes, int64_t bytes_per_class) const;

    // Calls f(first class, rows (., width) of w in the compute type) for one chunk after the other.
    // Where there is an index, or w has another type, width or layout, one buffer holds the chunk.
    // Writes 1 / |row| into `inverse` (classes,) where it is given.
    template <class F>
    void for_each_chunk(int64_t most, const OptionalTensor& inverse, F&& f) {
        for (int64_t first = 0; first < c; first += most)
            f(first, readable_classes(first, std::min(first + most, c), inverse));
    }

    // Returns the rows of w as they are stored.
    StoredRows stored_w() const;

    // Returns where the index has the rows of a chunk, or null.
    const int64_t* index_from(int64_t first) const;

    // Continues (C,) or (N,) to `size` numbers.
    Tensor padded(const Tensor& t, int64_t size, double value) const;

    // Returns how many class tiles hold so many rows of w.
    int64_t tiles_of(int64_t w_rows) const { return ceil_div(w_rows, kTileClasses * sub_centers); }

    // Returns the blocks per row tile for a launch over chunks of so many rows of w.
    int64_t columns(int64_t w_rows) const;

    // Returns the arguments of a tile kernel for a chunk.
    TileCall tile_call(int64_t first, const Tensor& w_chunk, const Tensor& q, const Tensor& flags,
                       int64_t columns) const;
    TileVariant variant() const { return {type, small, transform}; }
    // Returns memory for the flags of tiles with a target, and how a kernel writes them.
    Tensor flags() const;
    TargetTiles target_tiles(const Tensor& flags) const;

    // Returns the arguments of a kernel over a GEMM's result for a chunk.
    DenseCall dense_call(int64_t first, const Tensor& products, const Tensor& x_inv,
                         const Tensor& w_inv) const;

  private:
    Tensor stored_x_, w_, w_buffer_;
    bool w_is_gathered_, w_is_readable_;

    void read_w(const SharedArguments&);
    Tensor readable_classes(int64_t first, int64_t stop, const OptionalTensor& inverse);
    // Writes 1 / |row| of readable rows where `inverse`, which may be longer, is given.
    void write_norms(const Tensor& rows, const OptionalTensor& inverse) const;
    // Rounds `count` rows into `out` (., width), and writes their norms too.
    void round(const StoredRows& from, int64_t count, const Tensor& out,
               const OptionalTensor& inverse) const;
};

// While it lives, the op's device is the current one, and neither autocast nor autograd sees the
// GEMMs of the op.
struct OpGuard {
    explicit OpGuard(const Tensor& x) : device(x.device()) {}

    c10::DeviceGuard device;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace marginkernels::cuda
