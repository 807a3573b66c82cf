// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Lists the variants of the projection that exist, and chooses among them.

#include "launch.h"
#include "project.cuh"

namespace marginkernels::cuda {
namespace {

template <class T, class Out, int kFours>
void run(const ProjectCall& call, Stream stream) {
    launch("project_kernel", project_kernel<T, Out, kFours>, blocks_of(call.count, kRowsPerBlock),
           kRowThreads, 0, stream, call);
}

// Rows of up to 1024 numbers stay in registers, but for fp64.
template <class T, class Out>
void run(const ProjectCall& call, Stream stream) {
    constexpr int kNumbers = kWarp * 4;  // of a warp that has four in each lane
    if constexpr (!std::is_same_v<T, double>) {
        if (call.raw.width <= 4 * kNumbers) return run<T, Out, 4>(call, stream);
        if (call.raw.width <= 8 * kNumbers) return run<T, Out, 8>(call, stream);
    }
    run<T, Out, 0>(call, stream);
}

}  // namespace

void launch_project(const ProjectCall& call, Type type, Stream stream) {
    with_type(type, [&](auto value) {
        with_type(call.out_type,
                  [&](auto out) { run<decltype(value), decltype(out)>(call, stream); });
    });
}

}  // namespace marginkernels::cuda
