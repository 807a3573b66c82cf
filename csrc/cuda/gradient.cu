// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Lists the variants of the gradient kernel that exist, and chooses among them.

#include "gradient.cuh"
#include "launch.h"

namespace marginkernels::cuda {
namespace {

template <class T, class Tile, class F, bool kGeneral>
void run(const GradientCall& call, Stream stream) {
    launch("gradient_kernel", gradient_kernel<T, Tile, F, kGeneral>,
           static_cast<int64_t>(call.tile.row_tiles) * call.tile.columns, Tile::kThreads,
           call.tile.stages * Tile::kStageBytes, stream, call);
}

template <class T, class F>
void run_centers(const GradientCall& call, Stream stream) {
    using Tile = SmallTile;
    launch("centers_gradient_kernel", centers_gradient_kernel<T, Tile, F>,
           static_cast<int64_t>(call.tile.row_tiles) * call.tile.columns, Tile::kThreads,
           call.tile.stages * Tile::kStageBytes, stream, call);
}

template <class T>
void run(const GradientCall& call, const TileVariant& variant, Stream stream) {
    mk::visit(variant.transform, [&](auto functor) {
        using F = decltype(functor);
        if (call.tile.sub_centers > 1) {
            run_centers<T, F>(call, stream);
        } else if constexpr (!std::is_same_v<F, mk::Identity>) {
            run<T, SmallTile, F, true>(call, stream);
        } else if (call.general) {
            run<T, SmallTile, F, true>(call, stream);
        } else if (variant.small) {
            run<T, SmallTile, F, false>(call, stream);
        } else {
            run<T, BigTile, F, false>(call, stream);
        }
    });
}

}  // namespace

void launch_gradient(const GradientCall& call, const TileVariant& variant, Stream stream) {
    if (variant.type == Type::kBFloat16) {
        run<bf16>(call, variant, stream);
    } else {
        run<fp16>(call, variant, stream);
    }
}

}  // namespace marginkernels::cuda
