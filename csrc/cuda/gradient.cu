// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The variants of the gradient kernel that exist, and the choice among them.

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

template <class T>
void run(const GradientCall& call, const TileVariant& variant, Stream stream) {
    switch (variant.transform) {
        case Transform::kIdentity:
            if (variant.general) return run<T, SmallTile, mk::Identity, true>(call, stream);
            if (variant.small) return run<T, SmallTile, mk::Identity, false>(call, stream);
            return run<T, BigTile, mk::Identity, false>(call, stream);
        case Transform::kAirFace: return run<T, SmallTile, mk::AirFace, true>(call, stream);
        case Transform::kInterclassFilter:
            return run<T, SmallTile, mk::InterclassFilter, true>(call, stream);
        case Transform::kMVSoftmax: return run<T, SmallTile, mk::MVSoftmax, true>(call, stream);
        case Transform::kCurricular: return run<T, SmallTile, mk::Curricular, true>(call, stream);
        case Transform::kArcNegative: return run<T, SmallTile, mk::ArcNegative, true>(call, stream);
    }
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
