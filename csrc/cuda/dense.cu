// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launchers of the kernels that read a GEMM's result, with every transform in fp32 and fp64.

#include "dense.cuh"
#include "launch.h"

namespace marginkernels::cuda {
namespace {

// Calls f with values of the type of numbers and of the functor.
template <class F>
void dispatch(Transform transform, Type type, F&& f) {
    mk::visit(transform, [&](auto functor) {
        if (type == Type::kFloat64) {
            f(double(), functor);
        } else {
            f(float(), functor);
        }
    });
}

}  // namespace

void launch_dense_statistics(const DenseStatisticsCall& call, Transform transform, Type type,
                             Stream stream) {
    dispatch(transform, type, [&](auto value, auto functor) {
        using A = decltype(value);
        using F = decltype(functor);
        launch("dense_statistics_kernel",
               call.chunk.sub_centers > 1 ? dense_statistics_kernel<A, F, true>
                                          : dense_statistics_kernel<A, F, false>,
               static_cast<int64_t>(call.row_blocks) * call.slices, kDenseRows, 0, stream, call);
    });
}

void launch_dense_gradient(const DenseGradientCall& call, Transform transform, Type type,
                           Stream stream) {
    const int64_t blocks = (call.chunk.classes + kRowsPerBlock - 1) / kRowsPerBlock;
    dispatch(transform, type, [&](auto value, auto functor) {
        using A = decltype(value);
        using F = decltype(functor);
        launch("dense_gradient_kernel",
               call.chunk.sub_centers > 1 ? dense_centers_gradient_kernel<A, F>
                                          : dense_gradient_kernel<A, F>,
               blocks, kRowThreads, 0, stream, call);
    });
}

}  // namespace marginkernels::cuda
