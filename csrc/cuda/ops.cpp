// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Registers the ops of the backend "native" for CUDA tensors. Tests that run the kernels as fibers
// register them for CPU tensors, under other names.

#include "ops.h"

#include <torch/library.h>

namespace marginkernels::cuda {

#if defined(MK_ON_HOST)
TORCH_LIBRARY_IMPL(marginkernels, CPU, m) {
    m.impl("head_fwd_cuda_host", head_fwd);
    m.impl("head_bwd_cuda_host", head_bwd);
    m.impl("head_step_cuda_host", head_step);
    m.impl("head_held_cuda_host", head_held);
    m.impl("head_loss_cuda_host", head_loss);
}
#else
TORCH_LIBRARY_IMPL(marginkernels, CUDA, m) {
    m.impl("head_fwd_native", head_fwd);
    m.impl("head_bwd_native", head_bwd);
    m.impl("head_step_native", head_step);
    m.impl("head_held_native", head_held);
    m.impl("head_loss_native", head_loss);
}
#endif

}  // namespace marginkernels::cuda
