// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "operands.h"

#include "../arguments.h"

#if !defined(MK_ON_HOST)
#include <c10/cuda/CUDAStream.h>
#endif

namespace marginkernels::cuda {

Stream current_stream(const Tensor& x) {
#if defined(MK_ON_HOST)
    (void)x;
    return nullptr;
#else
    return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
}

namespace {

// Rows and classes, up to the end of the last tile, are ints in the kernels.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1024;
// Row kernels read this many numbers at once, see Four.
constexpr int64_t kDenseWidthUnit = 4;

bool is_readable(const Tensor& rows, int64_t width, at::ScalarType type) {
    return rows.scalar_type() == type && rows.size(1) == width && rows.is_contiguous() &&
           reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
}

// Returns rows whose numbers lie next to each other: these, or a copy.
Tensor with_neighbours(const Tensor& rows) {
    return rows.stride(1) == 1 ? rows : rows.contiguous();
}

StoredRows stored(const Tensor& rows, const int64_t* index, const char* name) {
    return {rows.const_data_ptr(),
            index,
            rows.stride(0),
            static_cast<int>(rows.size(1)),
            type_of(rows.scalar_type(), name),
            has_vectors(rows)};
}

// 1 / norm of a zero row.
double inverse_norm_limit(at::ScalarType compute) {
    return 1 / (compute == at::kHalf ? mk::kLeastNormFloat16 : mk::kLeastNorm);
}

}  // namespace

Type type_of(at::ScalarType type, const char* name) {
    switch (type) {
        case at::kFloat: return Type::kFloat32;
        case at::kDouble: return Type::kFloat64;
        case at::kBFloat16: return Type::kBFloat16;
        case at::kHalf: return Type::kFloat16;
        default:
            TORCH_CHECK_TYPE(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                             type);
    }
}

bool has_vectors(const Tensor& rows) {
    const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
    return rows.size(1) % 4 == 0 && rows.stride(0) % 4 == 0 && address % 16 == 0;
}

int64_t chunk_of(int64_t classes, int64_t bytes, int64_t bytes_per_class) {
    const int64_t most = std::max<int64_t>(bytes / std::max<int64_t>(bytes_per_class, 1), 1);
    const int64_t chunks = std::max<int64_t>(ceil_div(classes, most), 1);
    return std::max<int64_t>(round_up(ceil_div(classes, chunks), kTileClasses), kTileClasses);
}

int64_t columns_of(int64_t slots, int64_t row_tiles, int64_t class_tiles) {
    constexpr int64_t kMostWaves = 24;
    row_tiles = std::max<int64_t>(row_tiles, 1), class_tiles = std::max<int64_t>(class_tiles, 1);
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
        const int64_t columns = std::clamp<int64_t>(waves * slots / row_tiles, 1, class_tiles);
        // in quarters of what a block takes for a tile, one of which it takes to start
        const int64_t of_block = 4 * ceil_div(class_tiles, columns) + 1;
        const int64_t time = ceil_div(row_tiles * columns, slots) * of_block;
        if (time < least) best = columns, least = time;
    }
    return best;
}

Operands::Operands(const SharedArguments& p, bool needs_small_tiles) {
    check_shapes(p.x, p.w, p.y);
    transform = checked_transform(p.transform, p.bias, p.row_parameter, p.constants, p.x.size(0));
    mk::visit(transform,
              [&](auto functor) { one_versus_rest = decltype(functor)::kOneVersusRest; });
    type = type_of(p.compute, "compute_dtype");
    type_of(p.x.scalar_type(), "x"), type_of(p.w.scalar_type(), "w");
    TORCH_CHECK_VALUE(p.w.size(0) < kMostRows, "w: expected fewer than ", kMostRows,
                      " classes, got ", p.w.size(0));
    TORCH_CHECK_VALUE(p.x.size(0) < kMostRows, "x: expected fewer than ", kMostRows, " rows, got ",
                      p.x.size(0));
    stream = current_stream(p.x);
    compute = p.compute;
    normalize_w = p.normalize_w;
    inverse_limit = inverse_norm_limit(compute);
    n = p.x.size(0), d = p.x.size(1);
    targets = targets_per_row(p.y);
    TORCH_CHECK_VALUE(targets > 0 && pairs() < kMostRows,
                      "y: expected at least 1 label of a row "
                      "and fewer than ",
                      kMostRows, " in all, got ", p.y.sizes());
    c = p.index.has_value() ? p.index->size(0) : p.w.size(0);
    sub_centers = p.sub_centers;
    TORCH_CHECK_VALUE(sub_centers > 0 && c % sub_centers == 0,
                      "sub_centers: expected a divisor of ", c,
                      ", the rows of w in the sweep, got ", sub_centers);

    tiled = type == Type::kBFloat16 || type == Type::kFloat16;
    TORCH_CHECK_VALUE(!tiled || sub_centers <= kMostTileCenters, "sub_centers: expected at most ",
                      kMostTileCenters, " with compute_dtype ", compute, ", got ", sub_centers);
    needs_small_tiles |= sub_centers > 1 || p.bias.has_value() || transform != Transform::kIdentity;
    // a small tile takes longer for a logit: that is worth a quarter fewer rows
    const bool pads_less = 4 * round_up(n, BigTile::kRows) > 5 * round_up(n, SmallTile::kRows);
    small = needs_small_tiles || n <= SmallTile::kRows || pads_less;
    tile_rows = !tiled ? 1 : small ? SmallTile::kRows : BigTile::kRows;
    rows = round_up(n, tile_rows);
    classes = tiled ? round_up(c, kTileClasses * sub_centers) : c;
    width = round_up(d, tiled ? kTileFeatures : kDenseWidthUnit);

    stored_x_ = with_neighbours(p.x);
    x = rows == n && is_readable(stored_x_, width, compute)
            ? stored_x_
            : at::empty({rows, width}, p.x.options().dtype(compute));
    if (p.index.has_value()) index = p.index->contiguous();
    read_w(p);
    y = by_target(p.y), scale = p.scale;
    target_classes = sub_centers == 1 ? y : at::div(y, sub_centers, "floor");
    if (p.bias.has_value()) bias = padded(*p.bias, classes, 0);
    if (p.row_parameter.has_value()) row_parameter = padded(*p.row_parameter, rows, 0);
    if (p.constants.has_value()) constants = p.constants->contiguous();
}

Tensor Operands::empty(at::IntArrayRef sizes, at::ScalarType scalar_type) const {
    return at::empty(sizes, x.options().dtype(scalar_type));
}

Tensor Operands::statistics(at::IntArrayRef sizes) const {
    return empty(sizes, type == Type::kFloat64 ? at::kDouble : at::kFloat);
}

void Operands::read_w(const SharedArguments& p) {
    const bool is_kept = p.w_rounded.has_value() && p.w_rounded->numel() > 0;
    TORCH_CHECK_VALUE(!is_kept || p.w_rounded->sizes() == at::IntArrayRef({c, d}),
                      "w_rounded: expected (", c, ", ", d, "), got ", p.w_rounded->sizes());
    TORCH_CHECK_VALUE(!p.keep_rounded || (tiled && width == d),
                      "keep_rounded: expected a 16-bit compute_dtype and D in multiples of ",
                      kTileFeatures, ", got ", compute, " and ", d);
    w_rounded = empty(p.keep_rounded ? at::IntArrayRef({c, d}) : at::IntArrayRef({0}), compute);
    w_is_gathered_ = index.has_value() && !is_kept;
    w_ = with_neighbours(is_kept ? *p.w_rounded : p.w);
    w_is_readable_ = !w_is_gathered_ && !p.keep_rounded && is_readable(w_, width, compute);
}

void Operands::read_x(const OptionalTensor& inverse) {
    if (x.is_same(stored_x_)) return write_norms(x, inverse);
    round(stored(stored_x_, nullptr, "x"), n, x, inverse);
}

int64_t Operands::chunk_classes(int64_t bytes, int64_t bytes_per_class) const {
    const int64_t of_w = rounds_w() ? width * x.element_size() : 0;
    return sub_centers * chunk_of(c / sub_centers, bytes, sub_centers * (bytes_per_class + of_w));
}

Tensor Operands::readable_classes(int64_t first, int64_t stop, const OptionalTensor& inverse) {
    const int64_t count = stop - first;
    OptionalTensor norms;  // the last chunk has those of padding too
    if (inverse.has_value())
        norms = inverse->narrow(0, first, (stop == c ? inverse->size(0) : stop) - first);
    if (w_is_readable_) {
        const Tensor rows_of_chunk = w_.narrow(0, first, count);
        write_norms(rows_of_chunk, norms);
        return rows_of_chunk;
    }
    const bool keeps = w_rounded.numel() > 0;
    // the first chunk is the longest
    if (!keeps && !w_buffer_.defined()) w_buffer_ = at::empty({count, width}, x.options());
    const Tensor buffer = keeps ? w_rounded.narrow(0, first, count) : w_buffer_.narrow(0, 0, count);
    StoredRows from = stored_w();
    if (from.index) {
        from.index += first;
    } else {
        from.data = static_cast<const char*>(from.data) + first * from.stride * w_.element_size();
    }
    round(from, count, buffer, norms);
    return buffer;
}

void Operands::write_norms(const Tensor& of_rows, const OptionalTensor& inverse) const {
    if (!inverse.has_value()) return;
    launch_norm(of_rows.const_data_ptr(), inverse->mutable_data_ptr(), of_rows.size(0),
                inverse->size(0), static_cast<int>(width), inverse_limit, type, stream);
}

void Operands::round(const StoredRows& from, int64_t count, const Tensor& out,
                     const OptionalTensor& inverse) const {
    RoundCall call = {};
    call.from = from;
    call.count = count;
    call.out = out.mutable_data_ptr();
    call.out_rows = out.size(0);
    if (inverse.has_value()) {
        call.inverse = inverse->mutable_data_ptr();
        call.inverse_rows = inverse->size(0);
    }
    call.width = static_cast<int>(width);
    call.inverse_limit = inverse_limit;
    launch_round(call, type, stream);
}

StoredRows Operands::stored_w() const {
    return stored(w_, w_is_gathered_ ? index_from(0) : nullptr, "w");
}

const int64_t* Operands::index_from(int64_t first) const {
    return index.has_value() ? index->const_data_ptr<int64_t>() + first : nullptr;
}

Tensor Operands::padded(const Tensor& t, int64_t size, double value) const {
    if (t.size(0) == size) return t.contiguous();
    return at::constant_pad_nd(t, {0, size - t.size(0)}, value);
}

Tensor Operands::flags() const {
    return empty({row_tiles(), round_up(class_tiles(), 16)}, at::kByte);
}

TargetTiles Operands::target_tiles(const Tensor& flags) const {
    return {target_classes.const_data_ptr<int64_t>(),
            flags.mutable_data_ptr<uint8_t>(),
            static_cast<int>(n),
            static_cast<int>(targets),
            static_cast<int>(tile_rows),
            static_cast<int>(flags.size(1))};
}

TileCall Operands::tile_call(int64_t first, const Tensor& w_chunk, const Tensor& q,
                             const Tensor& flags, int64_t columns) const {
    TileCall call = {};
    call.x = x.const_data_ptr();
    call.w = w_chunk.const_data_ptr();
    call.y = target_classes.const_data_ptr<int64_t>();
    call.flags = flags.const_data_ptr<uint8_t>();
    call.q = floats(q);
    call.bias = floats(bias);
    call.scale = floats(scale);
    call.row_parameter = floats(row_parameter);
    call.constants = floats(constants);
    call.n = static_cast<int>(n);
    call.c = static_cast<int>(c / sub_centers);
    call.targets = static_cast<int>(targets);
    call.sub_centers = static_cast<int>(sub_centers);
    call.steps = static_cast<int>(width / kTileFeatures);
    call.row_tiles = static_cast<int>(row_tiles());
    call.flag_stride = static_cast<int>(flags.size(1));
    call.first_tile = static_cast<int>(tiles_of(first));
    call.stop_tile = static_cast<int>(tiles_of(first + w_chunk.size(0)));
    call.columns = static_cast<int>(columns);
    call.stages = stages_per_block();
    return call;
}

int64_t Operands::columns(int64_t w_rows) const {
    const int64_t slots = int64_t{multiprocessors()} * BigTile::kBlocksPerSm;
    return columns_of(slots, row_tiles(), tiles_of(w_rows));
}

DenseCall Operands::dense_call(int64_t first, const Tensor& products, const Tensor& x_inv,
                               const Tensor& w_inv) const {
    const auto of_chunk = [&](const Tensor& t) {
        return static_cast<const char*>(t.const_data_ptr()) + first * t.element_size();
    };
    DenseCall call = {};
    call.products = products.mutable_data_ptr();
    call.stride = products.stride(0);
    call.y = target_classes.const_data_ptr<int64_t>();
    call.x_inv = x_inv.const_data_ptr();
    call.q = normalize_w ? of_chunk(w_inv) : nullptr;
    call.bias = bias.has_value() ? of_chunk(*bias) : nullptr;
    call.scale = scale.const_data_ptr();
    call.row_parameter = pointer(row_parameter);
    call.constants = pointer(constants);
    call.inverse_limit = inverse_limit;
    call.n = static_cast<int>(n);
    call.classes = static_cast<int>(products.size(0) / sub_centers);
    call.targets = static_cast<int>(targets);
    call.sub_centers = static_cast<int>(sub_centers);
    call.first_class = first / sub_centers;
    return call;
}

}  // namespace marginkernels::cuda
