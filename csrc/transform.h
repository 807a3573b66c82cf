// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Identifies a negative transform for code that only passes it on; transforms.h has the formulas.
//
// The two headers are apart because the CPU kernels of every instruction set include this one
// before they choose theirs, and the formulas after that.

#pragma once

namespace mk {

// A position in the list of functors (transforms.h), which the identity leads.
enum class Transform : int { kIdentity = 0 };

// Room for the constants of a transform. No functor may have more: transforms.h checks it.
constexpr int kMostConstants = 4;

}  // namespace mk
