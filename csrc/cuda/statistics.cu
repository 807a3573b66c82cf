// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Lists the variants of the statistics kernel that exist, and chooses among them.

#include "launch.h"
#include "statistics.cuh"

namespace marginkernels::cuda {
namespace {

template <class T, class Tile, class Options>
void run(const StatisticsCall& call, Stream stream) {
    launch("statistics_kernel", statistics_kernel<T, Tile, Options>,
           static_cast<int64_t>(call.tile.row_tiles) * call.tile.columns, Tile::kThreads,
           call.tile.stages * Tile::kStageBytes, stream, call);
}

// Classes of several centres have the variants with the most statistics only.
template <class T, class F>
void run_centers(const StatisticsCall& call, Stream stream) {
    if constexpr (std::is_same_v<F, mk::Identity>)
        if (call.tile.bias) return run<T, SmallTile, CentersOptions<F, true>>(call, stream);
    run<T, SmallTile, CentersOptions<F, false>>(call, stream);
}

template <class T, class Tile>
void run_identity(const StatisticsCall& call, Stream stream) {
    using F = mk::Identity;
    if (call.tile.bias) {
        run<T, SmallTile, StatisticsOptions<F, true, true>>(call, stream);
    } else if (call.tiles == nullptr) {
        if (call.want_sum) return run<T, Tile, StatisticsOptions<F, false, true>>(call, stream);
        run<T, Tile, StatisticsOptions<F>>(call, stream);
    } else if constexpr (std::is_same_v<T, bf16>) {
        if (call.want_max)
            return run<T, SmallTile, StatisticsOptions<F, false, false, true, true>>(call, stream);
        run<T, Tile, StatisticsOptions<F, false, false, true>>(call, stream);
    } else {
        throw std::invalid_argument("save_tiles: expected bfloat16, got float16");
    }
}

template <class T>
void run(const StatisticsCall& call, const TileVariant& variant, Stream stream) {
    mk::visit(variant.transform, [&](auto functor) {
        using F = decltype(functor);
        if (call.tile.sub_centers > 1) {
            run_centers<T, F>(call, stream);
        } else if constexpr (!std::is_same_v<F, mk::Identity>) {
            run<T, SmallTile, StatisticsOptions<F, false, true, false, true>>(call, stream);
        } else if (variant.small) {
            run_identity<T, SmallTile>(call, stream);
        } else {
            run_identity<T, BigTile>(call, stream);
        }
    });
}

}  // namespace

void launch_statistics(const StatisticsCall& call, const TileVariant& variant, Stream stream) {
    if (variant.type == Type::kBFloat16) {
        run<bf16>(call, variant, stream);
    } else {
        run<fp16>(call, variant, stream);
    }
}

}  // namespace marginkernels::cuda
