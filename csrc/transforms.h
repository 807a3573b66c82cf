// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Negative transforms: what a loss makes of the cosine of a row and a class that is not its target.
// The logit is z = scale * value, and slope is d value / d cosine. marginkernels/transforms.py has
// the same in PyTorch, with the papers; tests/test_transforms.py compares them.

#pragma once

#include "math.h"

namespace mk {

template <class T>
struct Transformed {
    T value, slope;
};

// Each functor takes the cosine, the row's parameter and the loss's constants.

struct Identity {
    static constexpr int kConstants = 0;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const float*) {
        return {c, 1.0F - T{}};
    }
};

struct AirFace {
    static constexpr int kConstants = 0;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const float*) {
        const T one = 1.0F - T{}, smallest_sine = 1e-4F - T{};
        T magnitude = c < 0.0F ? -c : c;
        magnitude = magnitude < one ? magnitude : one;
        // acos of the magnitude within 2e-8: Abramowitz and Stegun 4.4.46
        T p = magnitude * -0.0012624911F + 0.0066700901F;
        p = p * magnitude - 0.0170881256F;
        p = p * magnitude + 0.0308918810F;
        p = p * magnitude - 0.0501743046F;
        p = p * magnitude + 0.0889789874F;
        p = p * magnitude - 0.2145988016F;
        p = p * magnitude + 1.5707963050F;
        const T root = Lanes<T>::sqrt(1.0F - magnitude);
        const T angle = root * p * 0.636619772F;  // in right angles
        T sine = root * Lanes<T>::sqrt(1.0F + magnitude);
        sine = sine > smallest_sine ? sine : smallest_sine;
        return {c < 0.0F ? angle - 1.0F : 1.0F - angle, 0.636619772F / sine};
    }
};

// constants: the cosine above which a class is taken for the same identity, mislabelled
struct InterclassFilter {
    static constexpr int kConstants = 1;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const float* constants) {
        const auto filtered = c > constants[0] - T{};
        return {filtered ? T{} : c, filtered ? T{} : 1.0F - T{}};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct MVSoftmax {
    static constexpr int kConstants = 1;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const float* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? (t + 1.0F) * c + t : c, hard ? t + 1.0F : one};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct Curricular {
    static constexpr int kConstants = 1;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const float* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? c * (t + c) : c, hard ? t + 2.0F * c : one};
    }
};

// parameter: the target's cosine with its margin; constants: alpha, sigma
struct ArcNegative {
    static constexpr int kConstants = 2;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T target, const float* constants) {
        const T distance = c - target;
        const T t = constants[0] * exp(distance * distance * (-1.0F / constants[1]));
        return {t * c + t - 1.0F, t};
    }
};

}  // namespace mk
