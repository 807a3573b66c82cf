// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Which negative transform: for those who only pass it on. transforms.h has what they compute.

#pragma once

namespace mk {

enum class Transform {
    kIdentity,
    kAirFace,
    kInterclassFilter,
    kMVSoftmax,
    kCurricular,
    kArcNegative,
};

}  // namespace mk
