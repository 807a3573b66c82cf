// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// A step of each rule: by the sweep, and by the same rule in fp64.

#pragma once

#include "../../csrc/update.h"
#include "case.h"

namespace {

// Numbers of a step that suit every rule: 1/2 as unscale, at most 3 as norm of a row's gradient.
constexpr double kNumbers[] = {0.5, 0, 3, 0.5, 0.01, 0.9, 0.75, 0.5, 1.5, 0, 0, 0};

// w and its state before a step by the sweep, and after it.
template <class Functor>
struct Stepped {
    static constexpr float kState = 0.5F;  // every number of it

    Stored w;
    std::vector<Stored> states;
    std::vector<float> row_state, w_inv;

    Stepped(mk::Rule rule, const Inputs& in, Results& results, int threads)
        : w(in.all_w), row_state(in.rows(), kState), w_inv(in.one.c) {
        const std::vector<float> start(in.rows() * in.one.d, kState);
        for (int m = 0; m < Functor::kStates; ++m)
            states.emplace_back(start, in.rows(), in.one.d, in.one.w_type);
        Update update = {};
        update.rule = rule;
        std::copy(kNumbers, kNumbers + mk::kUpdateNumbers, update.numbers);
        update.seed = 7, update.step = 3, update.first_class = 11;
        update.w = w.writable();
        for (int m = 0; m < Functor::kStates; ++m) update.states[m] = states[m].writable();
        update.row_state = row_state.data(), update.row_state_stride = 1;
        update.w_inv = w_inv.data();
        results.backward(w, nullptr, &update, threads);
    }

    bool same_bits(const Stepped& other) const {
        for (int m = 0; m < Functor::kStates; ++m)
            if (!states[m].same_bits(other.states[m])) return false;
        return w.same_bits(other.w) && row_state == other.row_state && w_inv == other.w_inv;
    }
};

// The same by the rule in fp64, for the classes that are swept.
template <class Functor>
struct ExpectedStep {
    Matrix w, states[mk::kMostStates];

    ExpectedStep(const Inputs& in, const Matrix& dw) {
        const int64_t d = in.one.d;
        for (int64_t j = 0; j < in.one.c; ++j) {
            Matrix g(dw.begin() + j * d, dw.begin() + (j + 1) * d), old(d);
            double squares = 0, terms = 0, row_state = Stepped<Functor>::kState;
            for (double& v : g) v *= kNumbers[mk::kUnscale], squares += v * v;
            for (int64_t k = 0; k < d; ++k) {
                g[k] *= std::min(1.0, kNumbers[mk::kMaxRowNorm] / std::sqrt(squares));
                old[k] = in.w.at(j, k, Type::kFloat32);
                if constexpr (Functor::kHasRowState)
                    terms += Functor::row_term(old[k], g[k], kNumbers + mk::kOfRule);
            }
            if constexpr (Functor::kHasRowState)
                row_state = Functor::row_state(row_state, terms / d, kNumbers + mk::kOfRule);
            for (int64_t k = 0; k < d; ++k) {
                double state[mk::kMostStates] = {Stepped<Functor>::kState,
                                                 Stepped<Functor>::kState};
                w.push_back(Functor::apply(old[k], g[k], state, row_state, kNumbers + mk::kOfRule));
                for (int m = 0; m < Functor::kStates; ++m) states[m].push_back(state[m]);
            }
        }
    }
};

// Makes a step of every rule with each number of threads. Calls check(name, got, want) with rows of
// w and of the states, and check_same(name, whether bits are the same).
template <class Check, class CheckSame>
void run_steps(const Inputs& in, Results& results, const Matrix& dw, const Check& check,
               const CheckSame& check_same) {
    const Matrix dx = results.dx.values();
    mk::Rules::for_each([&](mk::Rule rule, auto functor) {
        using Functor = decltype(functor);
        const Stepped<Functor> got(rule, in, results, 1);
        check_same("dx of a step", results.dx.values() == dx);
        for (int threads = 2; threads <= 3; ++threads)
            check_same(Functor::kName, got.same_bits(Stepped<Functor>(rule, in, results, threads)));
        const ExpectedStep<Functor> want(in, dw);
        const auto swept = [&](const Stored& rows) {
            Matrix values;
            for (int64_t j = 0; j < in.one.c; ++j)
                for (int64_t k = 0; k < in.one.d; ++k)
                    values.push_back(rows.at(in.row(j), k, Type::kFloat32));
            return values;
        };
        check(Functor::kName, swept(got.w), want.w);
        for (int m = 0; m < Functor::kStates; ++m)
            check(Functor::kName, swept(got.states[m]), want.states[m]);
    });
}

}  // namespace
