// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The numbers of the contract between the package and its kernels. marginkernels/numerics.py has
// them for Python; tests/test_numerics.py compares the two.
//
// Constants alone: a function here would be compiled for the instruction set of whichever file
// includes this first (see cpu/problem.h).

#pragma once

#include <cstdint>

namespace mk {

// Rows below this norm are zero rows: their inverse norm is clamped and their gradient is 0.
constexpr double kLeastNorm = 1e-12, kLeastNormFloat16 = 1e-4;
// Callers refuse rows above this norm, so that sums of squares stay inside fp32.
constexpr double kGreatestNorm = 1e15;
static_assert(kGreatestNorm * kGreatestNorm < 3.4e38);

// exp(x) of fp32 numbers is 0 below minus this, and does not overflow up to it.
constexpr float kLargestExponent = 87.0F;
// With both sides normalised and no bias, logits lie in [-scale, scale]. Exponentials are then
// relative to max(0, scale - kOffsetStart) and need no running maximum: exp(kOffsetStart) leaves
// room in fp32 for a sum over 10^12 classes.
constexpr float kOffsetStart = 59.0F;
// Up to this scale (excluded) exp(-scale - offset) does not vanish either.
constexpr float kOffsetScaleLimit = (kOffsetStart + kLargestExponent) / 2;

// The running maximum of a row that has met no negative: below any logit in the domain, and finite,
// because -inf - (-inf) would be NaN.
constexpr float kNoMaximum = -1e30F;

// Slopes of an angle are taken as if its sine were at least this: they are infinite at |cosine|
// = 1.
constexpr double kLeastSine = 1e-4;

// Saved exponentials have their rows padded to a multiple of this, whatever the vectors are.
constexpr int64_t kTilePadding = 16;

// Positions in the numbers of an update step: what the gradient is multiplied with first, whether
// nothing is to be written, the greatest norm of a row's gradient, and where the numbers of the
// rule begin.
constexpr int kUnscale = 0, kSkip = 1, kMaxRowNorm = 2, kOfRule = 3;
constexpr int64_t kUpdateNumbers = 12;

// Rounds of the generator of random bits; Salmon et al. (2011) found no flaw from 7 on.
constexpr int kPhiloxRounds = 7;

}  // namespace mk
