// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

#include "operands.h"

#include "../arguments.h"

#if !defined(MK_ON_HOST)
#include <c10/cuda/CUDAStream.h>
#endif

namespace marginkernels::cuda {
namespace {

// Rows and classes, up to the end of the last tile, are ints in the kernels.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1024;
// A chunk of w rounded to the compute type.
constexpr int64_t kWChunkBytes = 32 * kMiB;
// Row kernels read this many numbers at once, see Four.
constexpr int64_t kDenseWidthUnit = 4;

Stream current_stream(const Tensor& x) {
#if defined(MK_ON_HOST)
    (void)x;
    return nullptr;
#else
    return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
}

bool is_readable(const Tensor& rows, int64_t width, at::ScalarType type) {
    return rows.scalar_type() == type && rows.size(1) == width && rows.is_contiguous() &&
           reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
}

void copy_rows(const Tensor& to, const Tensor& rows) {
    to.narrow(0, 0, rows.size(0)).narrow(1, 0, rows.size(1)).copy_(rows);
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
    return rows.size(1) % 4 == 0 && address % 16 == 0;
}

Operands::Operands(const SharedArguments& p, bool needs_small_tiles) {
    check_shapes(p.x, p.w, p.y);
    transform = checked_transform(p.transform, p.bias, p.row_parameter, p.constants, p.x.size(0));
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
    c = p.index.has_value() ? p.index->size(0) : p.w.size(0);

    tiled = type == Type::kBFloat16 || type == Type::kFloat16;
    needs_small_tiles |= p.bias.has_value() || transform != Transform::kIdentity;
    small = needs_small_tiles || n <= SmallTile::kRows;
    tile_rows = !tiled ? 1 : small ? SmallTile::kRows : BigTile::kRows;
    rows = round_up(n, tile_rows);
    classes = tiled ? round_up(c, kTileClasses) : c;
    width = round_up(d, tiled ? kTileFeatures : kDenseWidthUnit);

    x = p.x;
    if (rows != n || !is_readable(x, width, compute)) {
        x = at::zeros({rows, width}, p.x.options().dtype(compute));
        copy_rows(x, p.x);
    }
    if (p.index.has_value()) index = p.index->contiguous();
    w_ = index.has_value() ? p.w.contiguous() : p.w;
    w_is_readable_ = !index.has_value() && is_readable(w_, width, compute);
    y = p.y.contiguous(), scale = p.scale;
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

int64_t Operands::chunk_classes(int64_t bytes, int64_t bytes_per_class) const {
    int64_t most = bytes / std::max<int64_t>(bytes_per_class, 1);
    if (!w_is_readable_) {
        const int64_t row_bytes = std::max<int64_t>(width * x.element_size(), 1);
        most = std::min(most, kWChunkBytes / row_bytes);
    }
    return std::max<int64_t>(most / kTileClasses, 1) * kTileClasses;
}

Tensor Operands::readable_classes(int64_t first, int64_t stop) {
    const int64_t count = stop - first;
    if (w_is_readable_) return w_.narrow(0, first, count);
    // the first chunk is the longest
    if (!w_buffer_.defined()) w_buffer_ = at::zeros({count, width}, x.options());
    const Tensor buffer = w_buffer_.narrow(0, 0, count);
    if (index.has_value()) {
        gather(first, buffer);
    } else {
        copy_rows(buffer, w_.narrow(0, first, count));
    }
    return buffer;
}

void Operands::gather(int64_t first, const Tensor& out) const {
    GatherCall call = {};
    call.table = w_.const_data_ptr();
    call.index = index_from(first);
    call.out = out.mutable_data_ptr();
    call.count = out.size(0);
    call.width = static_cast<int>(width);
    call.d = static_cast<int>(d);
    call.vectors = has_vectors(w_);
    launch_gather(call, type_of(w_.scalar_type(), "w"), type, stream);
}

const int64_t* Operands::index_from(int64_t first) const {
    return index.has_value() ? index->const_data_ptr<int64_t>() + first : nullptr;
}

void Operands::inverse_norms(const Tensor& of_rows, int64_t count, const Tensor& inverse) const {
    launch_norm(of_rows.const_data_ptr(), inverse.mutable_data_ptr(), count, inverse.size(0),
                static_cast<int>(width), inverse_limit, type, stream);
}

Tensor Operands::label_rows() const {
    const Tensor picked = statistics({n, width}).zero_();
    if (c == 0) return picked;
    Tensor labels = y.clamp_min(0);
    if (index.has_value()) labels = index->index_select(0, labels);
    copy_rows(picked, w_.index_select(0, labels).to(compute));
    return picked;
}

Tensor Operands::padded(const Tensor& t, int64_t size, double value) const {
    if (t.size(0) == size) return t.contiguous();
    return at::constant_pad_nd(t, {0, size - t.size(0)}, value);
}

Tensor Operands::flags() const {
    const Tensor table = at::zeros({row_tiles(), class_tiles()}, x.options().dtype(at::kByte));
    launch_flag(y.const_data_ptr<int64_t>(), table.mutable_data_ptr<uint8_t>(), static_cast<int>(n),
                static_cast<int>(tile_rows), static_cast<int>(class_tiles()), stream);
    return table;
}

TileCall Operands::tile_call(int64_t first, const Tensor& w_chunk, const Tensor& q,
                             const Tensor& flags, int64_t columns) const {
    TileCall call = {};
    call.x = x.const_data_ptr();
    call.w = w_chunk.const_data_ptr();
    call.y = y.const_data_ptr<int64_t>();
    call.flags = flags.const_data_ptr<uint8_t>();
    call.q = floats(q);
    call.bias = floats(bias);
    call.scale = floats(scale);
    call.row_parameter = floats(row_parameter);
    call.constants = floats(constants);
    call.n = static_cast<int>(n);
    call.c = static_cast<int>(c);
    call.steps = static_cast<int>(width / kTileFeatures);
    call.row_tiles = static_cast<int>(row_tiles());
    call.class_tiles = static_cast<int>(class_tiles());
    call.first_tile = static_cast<int>(first / kTileClasses);
    call.stop_tile = static_cast<int>(ceil_div(first + w_chunk.size(0), kTileClasses));
    call.columns = static_cast<int>(columns);
    call.stages = stages_per_block();
    return call;
}

int64_t Operands::columns(int64_t most) const {
    const int64_t slots = int64_t{multiprocessors()} * BigTile::kBlocksPerSm;
    return std::max<int64_t>(1, std::min(slots / std::max<int64_t>(row_tiles(), 1), most));
}

DenseCall Operands::dense_call(int64_t first, const Tensor& products, const Tensor& x_inv,
                               const Tensor& w_inv) const {
    const auto of_chunk = [&](const Tensor& t) {
        return static_cast<const char*>(t.const_data_ptr()) + first * t.element_size();
    };
    DenseCall call = {};
    call.products = products.mutable_data_ptr();
    call.stride = products.stride(0);
    call.y = y.const_data_ptr<int64_t>();
    call.x_inv = x_inv.const_data_ptr();
    call.q = normalize_w ? of_chunk(w_inv) : nullptr;
    call.bias = bias.has_value() ? of_chunk(*bias) : nullptr;
    call.scale = scale.const_data_ptr();
    call.row_parameter = pointer(row_parameter);
    call.constants = pointer(constants);
    call.inverse_limit = inverse_limit;
    call.n = static_cast<int>(n);
    call.classes = static_cast<int>(products.size(0));
    call.first_class = first;
    return call;
}

}  // namespace marginkernels::cuda
