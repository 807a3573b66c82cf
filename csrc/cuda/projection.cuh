// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The gradient of a row that is normalised: what is added to the GEMM's sums, and the part along
// the row that is removed.

#pragma once

#include "warp.cuh"

namespace marginkernels::cuda {

// A row's gradient along the unit row, with the target's share, and its projection.
template <class A>
class RowGradient {
  public:
    __device__ __forceinline__ RowGradient(const RawGradient& raw, int64_t row) {
        inverse = static_cast<const A*>(raw.inverse)[row];
        sums_ = static_cast<const A*>(raw.sums) + row * raw.width;
        factor_ = raw.factor ? static_cast<const A*>(raw.factor)[row * raw.factor_stride] : A(1);
        int64_t picked = row;
        is_added_ = true;
        if (raw.slot) {
            picked = raw.slot[row];
            is_added_ = is_target(picked, raw.y, raw.pairs, raw.first + row);
        }
        added_ = static_cast<const A*>(raw.table) + picked * raw.width;
        radial_ = raw.radial && is_added_ ? static_cast<const A*>(raw.radial)[picked] : A(0);
        is_zero_ = inverse >= A(raw.inverse_limit);
        is_erased_ = is_zero_ && raw.normalize;
    }

    A inverse;  // 1 / norm of the row

    // Returns four numbers of the gradient along the unit row.
    __device__ __forceinline__ Four<A> at(int k) const {
        auto g = load_four(sums_ + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) g.v[e] *= factor_;
        if (is_added_) {
            const auto more = load_four(added_ + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) g.v[e] += more.v[e];
        }
        return g;
    }

    // Returns what the unit row is multiplied with, from the warp's share of <g, row>, or 0 where
    // rows are not normalised. It is of the unit row because that of a small row could overflow.
    __device__ __forceinline__ A radius(A along) const {
        return -sum_over_warp(along) * inverse + radial_;
    }

    // Returns a number of the gradient of the raw row.
    __device__ __forceinline__ A tangent(A g, A value, A radius) const {
        return is_erased_ ? A(0) : g + (is_zero_ ? A(0) : radius * (inverse * value));
    }

  private:
    const A *sums_, *added_;
    A factor_, radial_;
    bool is_added_, is_zero_, is_erased_;
};

}  // namespace marginkernels::cuda
