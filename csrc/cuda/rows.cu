// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launchers of the kernels that walk along rows, in every type.

#include "launch.h"
#include "targets.cuh"

namespace marginkernels::cuda {
namespace {

// Calls f with a value of the type.
template <class F>
void with_type(Type type, F&& f) {
    switch (type) {
        case Type::kFloat32: return f(float());
        case Type::kFloat64: return f(double());
        case Type::kBFloat16: return f(bf16());
        case Type::kFloat16: return f(fp16());
    }
}

int64_t blocks_of(int64_t count, int per_block) {
    return (count + per_block - 1) / per_block;
}

}  // namespace

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

void launch_gather(const GatherCall& call, Type table, Type out, Stream stream) {
    with_type(table, [&](auto from) {
        with_type(out, [&](auto to) {
            launch("gather_kernel", gather_kernel<decltype(from), decltype(to)>,
                   blocks_of(call.count, kRowsPerBlock), kRowThreads, 0, stream, call);
        });
    });
}

void launch_flag(const int64_t* y, uint8_t* flags, int n, int tile_rows, int class_tiles,
                 Stream stream) {
    launch("flag_kernel", flag_kernel, blocks_of(n, kRowThreads), kRowThreads, 0, stream, y, flags,
           n, tile_rows, class_tiles);
}

void launch_statistics_rows(const float* x_inv, const float* scale, float* rate, int n, int padded,
                            bool log2_units, bool with_scale, Stream stream) {
    launch("statistics_rows_kernel", statistics_rows_kernel, blocks_of(padded, kRowThreads),
           kRowThreads, 0, stream, x_inv, scale, rate, n, padded, log2_units ? kLog2E : 1.0F,
           with_scale);
}

void launch_gradient_rows(const GradientRowsCall& call, Stream stream) {
    launch("gradient_rows_kernel", gradient_rows_kernel, blocks_of(call.padded, kRowThreads),
           kRowThreads, 0, stream, call);
}

void launch_finish_rows(const FinishRowsCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        launch("finish_rows_kernel", finish_rows_kernel<decltype(value)>,
               blocks_of(call.n, kRowsPerBlock), kRowThreads, 0, stream, call);
    });
}

void launch_target(const TargetCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        launch("target_kernel", target_kernel<decltype(value)>, blocks_of(call.n, kRowsPerBlock),
               kRowThreads, 0, stream, call);
    });
}

void launch_project(const ProjectCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        with_type(call.out_type, [&](auto out) {
            launch("project_kernel", project_kernel<decltype(value), decltype(out)>,
                   blocks_of(call.count, kRowsPerBlock), kRowThreads, 0, stream, call);
        });
    });
}

}  // namespace marginkernels::cuda
