// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The table of kernels of the instruction set that the including file has chosen.
//
// Each file of an instruction set (default.cpp, avx2.cpp, ...) includes this header once, after it
// has told the compiler its instructions, and so compiles its own copy of every header below: simd,
// gemm, rows, blocks, forward, backward. All that they define therefore stands in anonymous
// namespaces. With external linkage the linker would keep one copy of a function for all files,
// perhaps one whose instructions the processor lacks. For the same reason functions of math.h and
// transforms.h are always inlined, and standard headers are included before the instructions are
// chosen.

#pragma once

#include "backward.h"

namespace marginkernels {
namespace {

template <class Op>
constexpr Kernels kernels() {
    return {
        kLanes,
        kPanel,
        MK_BLOCK_CLASSES,
        scratch_bytes,
        prepare_rows<Op>,
        prepare_gradient<Op>,
        forward_stripe<Op>,
        backward_stripe<Op>,
        finish_dx,
    };
}

}  // namespace
}  // namespace marginkernels
