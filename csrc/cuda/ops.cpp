// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// marginkernels::head_fwd_native and head_bwd_native for CUDA tensors; for the CPU, where tests run
// the kernels as fibers, under names of their own.

#include "ops.h"

#include <torch/library.h>

namespace marginkernels::cuda {

#if defined(MK_ON_HOST)
TORCH_LIBRARY_IMPL(marginkernels, CPU, m) {
    m.impl("head_fwd_cuda_host", head_fwd);
    m.impl("head_bwd_cuda_host", head_bwd);
}
#else
TORCH_LIBRARY_IMPL(marginkernels, CUDA, m) {
    m.impl("head_fwd_native", head_fwd);
    m.impl("head_bwd_native", head_bwd);
}
#endif

}  // namespace marginkernels::cuda
