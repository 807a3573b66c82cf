// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The table of kernels of the instruction set that the including file has chosen.

#pragma once

#include "backward.h"

namespace marginkernels {
namespace {

template <class Op>
constexpr Kernels kernels() {
    return {kLanes,        kPanel,           MK_BLOCK_CLASSES,
            scratch_bytes, prepare_rows<Op>, prepare_gradient<Op>,
            forward<Op>,   backward<Op>,     finish_dx};
}

}  // namespace
}  // namespace marginkernels
