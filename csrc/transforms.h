// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Negative transforms: what a loss makes of the cosine of a row and a class that is not its target.
// The logit is z = scale * value, and slope is d value / d cosine. marginkernels/transforms.py has
// the same in PyTorch, with the papers; tests/test_transforms.py compares them.

#pragma once

#include "math.h"
#include "transform.h"

namespace mk {

template <class T>
struct Transformed {
    T value, slope;
};

// Each functor takes the cosine, the row's parameter and the loss's constants.

struct Identity {
    static constexpr int kConstants = 0;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const void*) {
        return {c, 1.0F - T{}};
    }
};

// acos(c) for c in [0, 1], where root = sqrt(1 - c), within 2e-8: Abramowitz and Stegun 4.4.46
template <class T>
MK_HOST_DEVICE T acos_of_positive(T c, T root) {
    T p = c * -0.0012624911F + 0.0066700901F;
    p = p * c - 0.0170881256F;
    p = p * c + 0.0308918810F;
    p = p * c - 0.0501743046F;
    p = p * c + 0.0889789874F;
    p = p * c - 0.2145988016F;
    p = p * c + 1.5707963050F;
    return root * p;
}

MK_HOST_DEVICE double acos_of_positive(double c, double) {
    return __builtin_acos(c);
}

struct AirFace {
    static constexpr int kConstants = 0;
    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const void*) {
        using S = typename Lanes<T>::Scalar;
        constexpr S kRightAngle = 0.63661977236758134, kSmallestSine = 1e-4;
        const T one = 1.0F - T{}, smallest_sine = kSmallestSine - T{};
        T magnitude = c < 0.0F ? -c : c;
        magnitude = magnitude < one ? magnitude : one;
        const T root = Lanes<T>::sqrt(1.0F - magnitude);
        const T angle = acos_of_positive(magnitude, root) * kRightAngle;  // in right angles
        T sine = root * Lanes<T>::sqrt(1.0F + magnitude);
        sine = sine > smallest_sine ? sine : smallest_sine;
        return {c < 0.0F ? angle - 1.0F : 1.0F - angle, kRightAngle / sine};
    }
};

// constants: the cosine above which a class is taken for the same identity, mislabelled
struct InterclassFilter {
    static constexpr int kConstants = 1;
    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const Constant* constants) {
        const auto filtered = c > constants[0] - T{};
        return {filtered ? T{} : c, filtered ? T{} : 1.0F - T{}};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct MVSoftmax {
    static constexpr int kConstants = 1;
    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const Constant* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? (t + 1.0F) * c + t : c, hard ? t + 1.0F : one};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct Curricular {
    static constexpr int kConstants = 1;
    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const Constant* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? c * (t + c) : c, hard ? t + 2.0F * c : one};
    }
};

// parameter: the target's cosine with its margin; constants: alpha, sigma
struct ArcNegative {
    static constexpr int kConstants = 2;
    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T target, const Constant* constants) {
        const T distance = c - target;
        const T t = constants[0] * exp(distance * distance * (-1.0F / constants[1]));
        return {t * c + t - 1.0F, t};
    }
};

// The functors by their names in marginkernels/transforms.py.
struct NamedTransform {
    const char* name;
    Transform transform;
    int constants;
    bool per_row;  // whether it takes a parameter of the row
};

constexpr NamedTransform kTransforms[] = {
    {"identity", Transform::kIdentity, Identity::kConstants, false},
    {"airface", Transform::kAirFace, AirFace::kConstants, false},
    {"interclass_filter", Transform::kInterclassFilter, InterclassFilter::kConstants, false},
    {"mv_softmax", Transform::kMVSoftmax, MVSoftmax::kConstants, true},
    {"curricular", Transform::kCurricular, Curricular::kConstants, true},
    {"arc_negative", Transform::kArcNegative, ArcNegative::kConstants, true},
};

}  // namespace mk
