// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The vendor's GEMMs with operands of the compute type and a result in the type of statistics. A
// 16-bit result would be rounded once per chunk of classes.

#pragma once

#include <ATen/ATen.h>
#if !defined(MK_ON_HOST)
#include <ATen/cuda/tunable/Tunable.h>
#endif

namespace marginkernels::cuda {

// Turns off, while it exists, what makes torch refuse an fp32 result of 16-bit operands:
// accumulation in fp16, and TunableOp.
class Fp32Allowed {
  public:
    Fp32Allowed() : half_(at::globalContext().allowFP16AccumulationCuBLAS()), tuned_(tuned()) {
        if (half_) at::globalContext().setAllowFP16AccumulationCuBLAS(false);
        if (tuned_) set_tuned(false);
    }
    ~Fp32Allowed() {
        if (half_) at::globalContext().setAllowFP16AccumulationCuBLAS(true);
        if (tuned_) set_tuned(true);
    }
    Fp32Allowed(const Fp32Allowed&) = delete;
    Fp32Allowed& operator=(const Fp32Allowed&) = delete;

    // Says whether that worked: PYTORCH_TUNABLEOP_ENABLED=1 cannot be turned off. On the CPU, where
    // tests run the kernels, torch has no such product.
    static bool holds(const at::Tensor& operand) { return operand.is_cuda() && !tuned(); }

  private:
#if defined(MK_ON_HOST)
    static bool tuned() { return false; }
    static void set_tuned(bool) {}
#else
    static bool tuned() { return at::cuda::tunable::getTuningContext()->IsTunableOpEnabled(); }
    static void set_tuned(bool on) { at::cuda::tunable::getTuningContext()->EnableTunableOp(on); }
#endif
    const bool half_, tuned_;
};

// Computes out = a b. Where torch cannot, the operands are converted: the same numbers by a copy.
inline void mm(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    const auto type = out.scalar_type();
    if (a.size(1) == 0) {  // an empty batch
        out.zero_();
    } else if (a.scalar_type() == type) {
        at::mm_out(out, a, b);
    } else if (const Fp32Allowed allowed; allowed.holds(a)) {
        at::mm_out(out, a, b, type);
    } else {
        at::mm_out(out, a.to(type), b.to(type));
    }
}

// Computes out += a b, as above.
inline void add_mm(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    const auto type = out.scalar_type();
    if (a.scalar_type() == type) {
        at::addmm_out(out, out, a, b);
    } else if (const Fp32Allowed allowed; allowed.holds(a)) {
        at::addmm_out(out, out, a, b, type);
    } else {
        at::addmm_out(out, out, a.to(type), b.to(type));
    }
}

}  // namespace marginkernels::cuda
