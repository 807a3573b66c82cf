// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Launchers of the kernels on the N numbers around the sweeps.

#include "launch.h"
#include "loss.cuh"

namespace marginkernels::cuda {

void launch_loss(const mk::LossCall<float>& call, Stream stream) {
    launch("loss_kernel", loss_kernel<float>, 1, kLossThreads, kLossThreads / kWarp * sizeof(float),
           stream, call);
}

void launch_loss(const mk::LossCall<double>& call, Stream stream) {
    launch("loss_kernel", loss_kernel<double>, 1, kLossThreads,
           kLossThreads / kWarp * sizeof(double), stream, call);
}

void launch_held(const int64_t* labels, int64_t* held, int64_t n, int64_t first, int64_t count,
                 int64_t ignore_index, Stream stream) {
    launch("held_kernel", held_kernel, (n + kRowThreads - 1) / kRowThreads, kRowThreads, 0, stream,
           labels, held, n, first, count, ignore_index);
}

}  // namespace marginkernels::cuda
