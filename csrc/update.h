// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Rules of update: how a step moves the row of a class and its state along the row's gradient.
// marginkernels/rules.py has the same in PyTorch; tests/test_rules.py compares them.
//
// A row's step, in fp32 or fp64: its gradient g is multiplied by numbers[kUnscale], then by
// bound_factor where numbers[kMaxRowNorm] is finite; the functor gives the new weights and the new
// state; with a projection, unit_factor puts the new weights back to norm one. Then rounding.h.
//
// A new rule is a functor here with its place in the list `Rules`, its row in
// marginkernels/rules.py and its twin in marginkernels/backends/triton/update.py. A functor that
// lacks a member does not compile.

#pragma once

#include "math.h"
#include "numerics.h"
#include "rule.h"

namespace mk {

// Returns what bounds the norm of a row's gradient, from its sum of squares; 1 without a bound.
template <class Number>
MK_HOST_DEVICE Number bound_factor(Number sum_of_squares, Number max_row_norm) {
    const Number norm = Lanes<Number>::sqrt(sum_of_squares);
    return norm > max_row_norm ? max_row_norm / norm : Number(1);  // also where both are infinite
}

// Returns what brings a row to norm one, from its sum of squares; 1 for a zero row.
template <class Number>
MK_HOST_DEVICE Number unit_factor(Number sum_of_squares, Number least_norm) {
    const Number norm = Lanes<Number>::sqrt(sum_of_squares);
    return norm < least_norm ? Number(1) : Number(1) / norm;
}

// Each functor has its name in marginkernels/rules.py, the number of its states that have a number
// per weight, and whether it has a state with one number per row. A rule without an optional state
// is a functor of its own under the same name: the number of states tells which.
// `apply` gets a weight, its gradient, its kStates states, which it replaces, the row's state after
// this step (0 where there is none) and the numbers of the rule, those from kOfRule on. It returns
// the new weight. T is a float, a double or a vector of floats.
// Where the row has a state, `row_term` returns what the state is made of for one weight, and
// `row_state` the new state from the old one and the terms' mean over the row.

struct Sgd {
    static constexpr const char* kName = "sgd";
    static constexpr int kStates = 0;
    static constexpr bool kHasRowState = false;
    enum { kLr, kWeightDecay };

    template <class T, class Number>
    static MK_HOST_DEVICE T apply(T w, T g, T*, Number, const Number* numbers) {
        return w - numbers[kLr] * (g + numbers[kWeightDecay] * w);
    }
};

// state: the momentum buffer
struct SgdWithMomentum {
    static constexpr const char* kName = "sgd";
    static constexpr int kStates = 1;
    static constexpr bool kHasRowState = false;
    enum { kLr, kWeightDecay, kMomentum, kGradWeight, kDirect, kThrough };

    template <class T, class Number>
    static MK_HOST_DEVICE T apply(T w, T g, T* state, Number, const Number* numbers) {
        const T d = g + numbers[kWeightDecay] * w;
        state[0] = numbers[kMomentum] * state[0] + numbers[kGradWeight] * d;
        return w - numbers[kLr] * (numbers[kDirect] * d + numbers[kThrough] * state[0]);
    }
};

// states: the means of the gradient and of its square
struct AdamW {
    static constexpr const char* kName = "adamw";
    static constexpr int kStates = 2;
    static constexpr bool kHasRowState = false;
    enum { kDecay, kBeta1, kBeta2, kEps, kStepSize, kRootCorrection };

    template <class T, class Number>
    static MK_HOST_DEVICE T apply(T w, T g, T* state, Number, const Number* numbers) {
        const Number rest1 = 1 - numbers[kBeta1], rest2 = 1 - numbers[kBeta2];
        state[0] = state[0] + rest1 * (g - state[0]);
        state[1] = numbers[kBeta2] * state[1] + rest2 * g * g;
        const T root = Lanes<T>::sqrt(state[1]) / numbers[kRootCorrection] + numbers[kEps];
        return numbers[kDecay] * w - numbers[kStepSize] * state[0] / root;
    }
};

// the row's state: the sum over the steps of the mean of squares
struct RowwiseAdagrad {
    static constexpr const char* kName = "rowwise_adagrad";
    static constexpr int kStates = 0;
    static constexpr bool kHasRowState = true;
    enum { kLr, kWeightDecay, kEps };

    template <class T, class Number>
    static MK_HOST_DEVICE T row_term(T w, T g, const Number* numbers) {
        const T d = g + numbers[kWeightDecay] * w;
        return d * d;
    }

    template <class Number>
    static MK_HOST_DEVICE Number row_state(Number state, Number mean, const Number*) {
        return state + mean;
    }

    template <class T, class Number>
    static MK_HOST_DEVICE T apply(T w, T g, T*, Number row_state, const Number* numbers) {
        const Number rate = numbers[kLr] / (Lanes<Number>::sqrt(row_state) + numbers[kEps]);
        return w - rate * (g + numbers[kWeightDecay] * w);
    }
};

template <class... Functors>
struct RuleList {
    static_assert(((Functors::kStates <= kMostStates) && ...), "rule.h has no room");

    // Calls f(position in the list, functor) for each in turn.
    template <class F>
    static MK_INLINE void for_each(const F& f) {
        int position = 0;
        const auto call = [&](auto functor) { f(static_cast<Rule>(position++), functor); };
        (call(Functors()), ...);
    }
};

using Rules = RuleList<Sgd, SgdWithMomentum, AdamW, RowwiseAdagrad>;

// Calls f with the functor of the rule.
template <class F>
MK_INLINE void visit(Rule rule, const F& f) {
    Rules::for_each([&](Rule position, auto functor) {
        if (position == rule) f(functor);
    });
}

}  // namespace mk
