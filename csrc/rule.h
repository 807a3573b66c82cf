// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Identifies a rule of update for code that only passes it on; update.h has the formulas.

#pragma once

namespace mk {

// A position in the list of functors (update.h).
enum class Rule : int {};

// Room for the states of a rule that have a number per weight. No functor may have more: update.h
// checks it.
constexpr int kMostStates = 2;

}  // namespace mk
