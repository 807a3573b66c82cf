// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Lists the variants of the update kernel that exist, and chooses among them.

#include "launch.h"
#include "update.cuh"

namespace marginkernels::cuda {
namespace {

template <class A, class W, class S, class F, int kFours>
void run(const UpdateCall& call, Stream stream) {
    launch("update_kernel", update_kernel<A, W, S, F, kFours>,
           (call.count + kRowsPerBlock - 1) / kRowsPerBlock, kRowThreads, 0, stream, call);
}

// Rows of up to 1024 fp32 numbers stay in registers.
template <class W, class S, class F>
void run(const UpdateCall& call, Stream stream) {
    constexpr int kNumbers = kWarp * 4;  // of a warp that has four in each lane
    if (call.raw.width <= 4 * kNumbers) {
        run<float, W, S, F, 4>(call, stream);
    } else if (call.raw.width <= 8 * kNumbers) {
        run<float, W, S, F, 8>(call, stream);
    } else {
        run<float, W, S, F, 0>(call, stream);
    }
}

template <class W, class F>
void run(const UpdateCall& call, const UpdateVariant& variant, Stream stream) {
    if constexpr (F::kStates > 0) {
        if (variant.state == Type::kBFloat16) return run<W, bf16, F>(call, stream);
    }
    run<W, float, F>(call, stream);
}

}  // namespace

void launch_update(const UpdateCall& call, const UpdateVariant& variant, Stream stream) {
    mk::visit(variant.rule, [&](auto functor) {
        using F = decltype(functor);
        if (variant.fp64) {
            run<double, double, double, F, 0>(call, stream);
        } else if (variant.w == Type::kBFloat16) {
            run<bf16, F>(call, variant, stream);
        } else {
            run<float, F>(call, variant, stream);
        }
    });
}

}  // namespace marginkernels::cuda
