// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The loss of a row and its derivatives, from the results of a sweep.
// marginkernels/rotation.py has the margin in PyTorch, and marginkernels/loss.py the loss.

#pragma once

#include "math.h"
#include "numerics.h"

namespace mk {

// The numbers of marginkernels/rotation.py, in its order.
template <class A>
struct Rotation {
    A cos, sin, threshold, shift, past_cosine, past_phi, less, exact;
};
constexpr int kRotationNumbers = 8;

template <class A>
Rotation<A> rotation_of(const double* numbers) {
    return {static_cast<A>(numbers[0]), static_cast<A>(numbers[1]), static_cast<A>(numbers[2]),
            static_cast<A>(numbers[3]), static_cast<A>(numbers[4]), static_cast<A>(numbers[5]),
            static_cast<A>(numbers[6]), static_cast<A>(numbers[7])};
}

// A row's loss before weights and reduction, and its derivatives. A row without a target has no
// derivatives.
template <class A>
struct RowLoss {
    A loss, by_lse, by_cosine, by_scale;
};

template <class A>
MK_HOST_DEVICE RowLoss<A> row_loss(A lse, A cosine, A scale, bool found, bool labelled,
                                   const Rotation<A>& r) {
    // a label that no rank holds must not pass for a loss
    if (!found) return {labelled ? static_cast<A>(__builtin_nan("")) : A(0), A(0), A(0), A(0)};
    const A square = (1 - cosine) * (1 + cosine);
    const A sine = Lanes<A>::sqrt(square < 0 ? A(0) : square);  // a NaN stays
    const A least = static_cast<A>(kLeastSine);
    const A phi = r.cos * cosine - r.sin * sine;
    const A phi_slope = r.cos + r.sin * cosine / (sine < least ? least : sine);
    const bool inside = cosine > r.threshold;
    const A past = r.shift + r.past_cosine * cosine + r.past_phi * phi;
    const A past_slope = r.past_cosine + r.past_phi * phi_slope;
    const A t = (inside ? phi : past) - r.less;
    const A slope = r.exact == 0 ? A(1) : inside ? phi_slope : past_slope;

    // -log sigmoid(excess), exact also where it is near 0, and 1 - p of the target
    const A excess = scale * t - lse;
    const A e = exp(excess < 0 ? excess : -excess);
    const A loss = (excess < 0 ? -excess : A(0)) + log1p_of_unit(e);
    const A missed = (excess < 0 ? A(1) : e) / (1 + e);
    return {loss, missed, -missed * scale * slope, -missed * t};
}

// One call of head_loss. A is the type of statistics; pointers to what is not wanted are null.
template <class A>
struct LossCall {
    const A *lse, *cosine, *w_norm, *sample_weight, *logit_max;  // (N,)
    const A* scale;                                              // ()
    const int64_t* y;                                            // (N,) as given
    A* loss;                                                     // (), or (N,) for "none"
    A* slopes;                                                   // (2, N), (3, N) with the scale
    A* row_loss;                                                 // (N,)
    bool* correct;                                               // (N,)
    int64_t n, ignore_index;
    bool mean, each, need_scale;
    Rotation<A> rotation;

    MK_HOST_DEVICE A weight(int64_t i) const {
        if (y[i] == ignore_index) return 0;
        return sample_weight == nullptr ? A(1) : sample_weight[i];
    }

    // Writes what belongs to row i, and returns its weighted loss. `share` is the derivative of the
    // loss with respect to that.
    MK_HOST_DEVICE A take(int64_t i, A share) const {
        const bool found = w_norm[i] > 0;
        const A s = *scale;
        const RowLoss<A> row =
            mk::row_loss(lse[i], cosine[i], s, found, y[i] != ignore_index, rotation);
        const A weighted = row.loss * weight(i), factor = found ? weight(i) * share : A(0);
        slopes[i] = row.by_lse * factor;
        slopes[n + i] = row.by_cosine * factor;
        if (need_scale) slopes[2 * n + i] = row.by_scale * factor;
        if (each) loss[i] = weighted;
        if (row_loss != nullptr) {
            row_loss[i] = row.loss;
            correct[i] = found && s * cosine[i] > logit_max[i];
        }
        return weighted;
    }
};

// Returns the place of a label among `count` classes from `first` on, or -1.
MK_HOST_DEVICE int64_t held_class(int64_t label, int64_t first, int64_t count,
                                  int64_t ignore_index) {
    const bool here = label >= first && label < first + count && label != ignore_index;
    return here ? label - first : -1;
}

}  // namespace mk
