// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The vendor's GEMMs with operands of the compute type and a result in the type of statistics. A
// 16-bit result would be rounded once per chunk of classes.

#pragma once

#include <ATen/ATen.h>

namespace marginkernels::cuda {

// Computes out = a b.
inline void mm(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    if (a.size(1) == 0) {  // an empty batch
        out.zero_();
    } else if (a.scalar_type() == out.scalar_type()) {
        at::mm_out(out, a, b);
    } else if (a.is_cuda()) {
        at::mm_out(out, a, b, out.scalar_type());
    } else {  // the CPU, where tests run the kernels, rounds the result: the same numbers by a copy
        at::mm_out(out, a.to(out.scalar_type()), b.to(out.scalar_type()));
    }
}

// Computes out += a b.
inline void add_mm(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    if (a.scalar_type() == out.scalar_type()) {
        at::addmm_out(out, out, a, b);
    } else if (a.is_cuda()) {
        at::addmm_out(out, out, a, b, out.scalar_type());
    } else {
        at::addmm_out(out, out, a.to(out.scalar_type()), b.to(out.scalar_type()));
    }
}

}  // namespace marginkernels::cuda
