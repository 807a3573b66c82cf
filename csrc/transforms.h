// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Negative transforms: how a loss changes the cosine of a row and a class that is not its target.
// The logit is z = scale * value, and slope is d value / d cosine. marginkernels/transforms.py has
// the same in PyTorch, with the papers; tests/test_transforms.py compares them.
//
// A new transform is a functor here with its place in the list `Transforms`, its row in
// marginkernels/transforms.py and its twin in marginkernels/backends/triton/transforms.py. A
// functor that lacks a member does not compile.

#pragma once

#include "math.h"
#include "numerics.h"
#include "transform.h"

namespace mk {

template <class T>
struct Transformed {
    T value, slope;
};

constexpr double kTwoOverPi = 0.63661977236758134;

// The absolute value of a constant that is a number; for a tensor at::abs is found by its
// namespace.
constexpr double abs(double constant) {
    return constant < 0 ? -constant : constant;
}

// Each functor has its name in marginkernels/transforms.py, its number of constants, whether it
// takes a parameter of the row, and whether a row's logits are brought together one versus rest, by
// the sum of their softplus, instead of by log-sum-exp. `apply` gets the cosine, the row's
// parameter and the constants. Classes that are left out have a cosine of -inf, or one far below
// -1: their value is ignored, but their slope must be finite, because kernels multiply it by 0.
// `steepest_slope` returns an upper bound of |slope| over all cosines. It takes the constants as
// numbers, or as a tensor whose values only the device knows.

struct Identity {
    static constexpr const char* kName = "identity";
    static constexpr int kConstants = 0;
    static constexpr bool kPerRow = false, kOneVersusRest = false;

    template <class Constants>
    static constexpr double steepest_slope(const Constants&) {
        return 1;
    }

    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const void*) {
        return {c, 1.0F - T{}};
    }
};

// Returns acos(c) for c in [0, 1] within 2e-8, with root = sqrt(1 - c): Abramowitz and
// Stegun 4.4.46
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
    static constexpr const char* kName = "airface";
    static constexpr int kConstants = 0;
    static constexpr bool kPerRow = false, kOneVersusRest = false;

    template <class Constants>
    static constexpr double steepest_slope(const Constants&) {
        return kTwoOverPi / kLeastSine;
    }

    template <class T>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const void*) {
        using S = typename Lanes<T>::Scalar;
        constexpr S kScale = kTwoOverPi, kSmallest = kLeastSine;
        const T one = 1.0F - T{}, smallest_sine = kSmallest - T{};
        T magnitude = c < 0.0F ? -c : c;
        magnitude = magnitude < one ? magnitude : one;
        const T root = Lanes<T>::sqrt(1.0F - magnitude);
        const T angle = acos_of_positive(magnitude, root) * kScale;  // in right angles
        T sine = root * Lanes<T>::sqrt(1.0F + magnitude);
        sine = sine > smallest_sine ? sine : smallest_sine;
        return {c < 0.0F ? angle - 1.0F : 1.0F - angle, kScale / sine};
    }
};

// constants: the cosine above which a class is taken for the same identity, mislabelled
struct InterclassFilter {
    static constexpr const char* kName = "interclass_filter";
    static constexpr int kConstants = 1;
    static constexpr bool kPerRow = false, kOneVersusRest = false;

    template <class Constants>
    static constexpr double steepest_slope(const Constants&) {
        return 1;
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const Constant* constants) {
        const auto filtered = c > constants[0] - T{};
        return {filtered ? T{} : c, filtered ? T{} : 1.0F - T{}};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct MVSoftmax {
    static constexpr const char* kName = "mv_softmax";
    static constexpr int kConstants = 1;
    static constexpr bool kPerRow = true, kOneVersusRest = false;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return abs(constants[0]) + 1;
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const Constant* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? (t + 1.0F) * c + t : c, hard ? t + 1.0F : one};
    }
};

// parameter: the cosine above which a class is hard; constants: t
struct Curricular {
    static constexpr const char* kName = "curricular";
    static constexpr int kConstants = 1;
    static constexpr bool kPerRow = true, kOneVersusRest = false;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return abs(constants[0]) + 2;
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const Constant* constants) {
        const T one = 1.0F - T{}, t = constants[0] - T{};
        const auto hard = c > threshold;
        return {hard ? c * (t + c) : c, hard ? t + 2.0F * c : one};
    }
};

// parameter: the target's cosine with its margin; constants: alpha, sigma
struct ArcNegative {
    static constexpr const char* kName = "arc_negative";
    static constexpr int kConstants = 2;
    static constexpr bool kPerRow = true, kOneVersusRest = false;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return abs(constants[0]);
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T target, const Constant* constants) {
        const T distance = c - target;
        const T t = constants[0] * exp(distance * distance * (-1.0F / constants[1]));
        return {t * c + t - 1.0F, t};
    }
};

// constants: m
struct Circle {
    static constexpr const char* kName = "circle";
    static constexpr int kConstants = 1;
    static constexpr bool kPerRow = false, kOneVersusRest = false;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return abs(constants[0]) + 1;
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const Constant* constants) {
        const T m = constants[0] - T{}, sum = c + m;
        const T weight = sum > T{} ? sum : T{};
        return {weight * (c - m), weight};
    }
};

// Computes cos(theta - p) by the cosine and sine of p.
template <class T, class Constant>
MK_HOST_DEVICE Transformed<T> rotated_back(T c, Constant cos, Constant sin) {
    using S = typename Lanes<T>::Scalar;
    constexpr S kSmallest = kLeastSine;
    const T smallest = kSmallest - T{}, square = (1.0F - c) * (1.0F + c);
    const T sine = Lanes<T>::sqrt(square > T{} ? square : T{});
    return {c * cos + sine * sin, cos - c * sin / (sine > smallest ? sine : smallest)};
}

// The largest slope of the same.
template <class Number>
constexpr auto steepest_rotation(const Number& cos, const Number& sin) {
    return abs(cos) + abs(sin) / kLeastSine;
}

// parameter: the cosine from which on a class is one of the hardest; constants: the cosine and sine
// of the penalty
struct Hardest {
    static constexpr const char* kName = "hardest";
    static constexpr int kConstants = 2;
    static constexpr bool kPerRow = true, kOneVersusRest = false;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return steepest_rotation(constants[0], constants[1]);
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T threshold, const Constant* constants) {
        const T one = 1.0F - T{};
        const auto near = c >= threshold;
        const T within = c > -one ? c : -one;  // a class that is left out may be far below
        const Transformed<T> turned = rotated_back(within, constants[0], constants[1]);
        return {near ? turned.value : c, near ? turned.slope : one};
    }
};

// constants: t, a positive integer, the shift, and the cosine and sine of the margin
struct SphereFace2 {
    static constexpr const char* kName = "sphereface2";
    static constexpr int kConstants = 4;
    static constexpr bool kPerRow = false, kOneVersusRest = true;

    template <class Constants>
    static constexpr auto steepest_slope(const Constants& constants) {
        return constants[0] * steepest_rotation(constants[2], constants[3]);
    }

    template <class T, class Constant>
    static MK_HOST_DEVICE Transformed<T> apply(T c, T, const Constant* constants) {
        const T one = 1.0F - T{};
        T within = c > -one ? c : -one;
        within = within < one ? within : one;
        const Transformed<T> turned = rotated_back(within, constants[2], constants[3]);
        T half = (turned.value + 1.0F) * 0.5F;
        half = half > T{} ? half : T{};
        T power = one;  // half^(t - 1)
        const int t = static_cast<int>(constants[0]);
        for (int k = 1; k < t; ++k) power *= half;
        return {2.0F * power * half - 1.0F + constants[1], constants[0] * power * turned.slope};
    }
};

template <class... Functors>
struct TransformList;

// Defined for lists that begin with the identity: Transform::kIdentity is the first position.
template <class... Others>
struct TransformList<Identity, Others...> {
    static_assert(((Others::kConstants <= kMostConstants) && ...), "transform.h has no room");

    // Calls f(position in the list, functor) for each in turn.
    template <class F>
    static MK_INLINE void for_each(const F& f) {
        int position = 0;
        const auto call = [&](auto functor) { f(static_cast<Transform>(position++), functor); };
        call(Identity());
        (call(Others()), ...);
    }
};

using Transforms = TransformList<Identity, AirFace, InterclassFilter, MVSoftmax, Curricular,
                                 ArcNegative, Circle, Hardest, SphereFace2>;

// Calls f with the functor of the transform.
template <class F>
MK_INLINE void visit(Transform transform, const F& f) {
    Transforms::for_each([&](Transform position, auto functor) {
        if (position == transform) f(functor);
    });
}

}  // namespace mk
