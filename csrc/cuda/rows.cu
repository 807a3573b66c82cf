// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launchers of the kernels that walk along rows, in every type.

#include <algorithm>

#include "launch.h"
#include "targets.cuh"

namespace marginkernels::cuda {

void launch_norm(const void* rows, void* inverse, int64_t count, int64_t padded, int width,
                 double inverse_limit, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        using T = decltype(value);
        using A = statistics_t<T>;
        launch("norm_kernel", norm_kernel<T>, blocks_of(padded, kRowsPerBlock), kRowThreads, 0,
               stream, static_cast<const T*>(rows), static_cast<A*>(inverse), count, padded, width,
               static_cast<A>(inverse_limit));
    });
}

void launch_round(const RoundCall& call, Type type, Stream stream) {
    const int64_t rows = std::max(call.out_rows, call.inverse ? call.inverse_rows : 0);
    with_type(call.from.type, [&](auto from) {
        with_type(type, [&](auto to) {
            launch("round_kernel", round_kernel<decltype(from), decltype(to)>,
                   blocks_of(rows, kRowsPerBlock), kRowThreads, 0, stream, call);
        });
    });
}

void launch_statistics_rows(const StatisticsRowsCall& call, int row_tiles, Stream stream) {
    launch("statistics_rows_kernel", statistics_rows_kernel, row_tiles, kRowThreads, 0, stream,
           call);
}

void launch_gradient_rows(const GradientRowsCall& call, int row_tiles, Stream stream) {
    launch("gradient_rows_kernel", gradient_rows_kernel, row_tiles, kRowThreads, 0, stream, call);
}

void launch_finish_rows(const FinishRowsCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        launch("finish_rows_kernel", finish_rows_kernel<decltype(value)>,
               blocks_of(call.n, kRowsPerBlock), kRowThreads, 0, stream, call);
    });
}

void launch_target(const TargetCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        launch("target_kernel", target_kernel<decltype(value)>,
               blocks_of(call.pairs, kRowsPerBlock), kRowThreads, 0, stream, call);
    });
}

}  // namespace marginkernels::cuda
