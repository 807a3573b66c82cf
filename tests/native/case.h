// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// A case of the sweeps: its operands, and what the sweeps make of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/schedule.h"
#include "../../csrc/transforms.h"

namespace {

using namespace marginkernels;

using Matrix = std::vector<double>;

struct Case {
    int64_t n, c, d;
    Type compute;
    Type x_type, w_type;
    bool normalize_x, normalize_w, bias, tiles, extras;
    bool index = false;  // w has twice as many rows, of which every other one is swept
    int64_t targets = 1, centers = 1;  // of a row; of a class
    bool one_versus_rest = false;      // by the transform below
};

using OneVersusRest = mk::SphereFace2;
constexpr float kConstants[] = {3, -0.2F, 0.98F, 0.2F};

// Returns the transform of a case.
Transform transform_of(const Case& one) {
    Transform found = Transform::kIdentity;
    mk::Transforms::for_each([&](Transform transform, auto functor) {
        if (std::is_same_v<decltype(functor), OneVersusRest>) found = transform;
    });
    return one.one_versus_rest ? found : Transform::kIdentity;
}

std::mt19937 generator(0);

std::vector<float> normal(int64_t count, float deviation = 1) {
    std::normal_distribution<float> distribution(0, deviation);
    std::vector<float> values(count);
    for (float& value : values) value = distribution(generator);
    return values;
}

uint16_t bf16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

float bf16_value(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// A matrix in its own type, its rows further apart than they are long.
struct Stored {
    std::vector<float> wide;
    std::vector<uint16_t> half;
    int64_t stride;
    Type type;

    Stored(const std::vector<float>& values, int64_t rows, int64_t d, Type type)
        : stride(d + 3), type(type) {
        const float hole = std::numeric_limits<float>::quiet_NaN();
        if (type == Type::kFloat32) wide.assign(rows * stride, hole);
        if (type == Type::kBFloat16) half.assign(rows * stride, 0x7fc0);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = 0; k < d; ++k)
                if (type == Type::kFloat32)
                    wide[i * stride + k] = values[i * d + k];
                else
                    half[i * stride + k] = bf16_bits(values[i * d + k]);
    }
    const void* data() const {
        return type == Type::kFloat32 ? static_cast<const void*>(wide.data()) : half.data();
    }
    // Compares bits, because holes are NaN.
    bool same_bits(const Stored& other) const {
        if (type == Type::kBFloat16) return half == other.half;
        return memcmp(wide.data(), other.wide.data(), wide.size() * sizeof(float)) == 0;
    }
    WritableRows writable() {
        void* const data = type == Type::kFloat32 ? static_cast<void*>(wide.data())
                                                  : static_cast<void*>(half.data());
        return {data, stride, type};
    }
    double at(int64_t i, int64_t k, Type compute) const {
        const float value =
            type == Type::kFloat32 ? wide[i * stride + k] : bf16_value(half[i * stride + k]);
        return compute == Type::kBFloat16 ? bf16_value(bf16_bits(value)) : value;
    }
};

// An output in its own type, read back as double.
struct Output {
    std::vector<float> wide;
    std::vector<uint16_t> half;
    Output(int64_t count, Type type) {
        if (type == Type::kFloat32)
            wide.resize(count);
        else
            half.resize(count);
    }
    void* data() { return wide.empty() ? static_cast<void*>(half.data()) : wide.data(); }
    Matrix values() const {
        Matrix out(wide.begin(), wide.end());
        for (uint16_t bits : half) out.push_back(bf16_value(bits));
        return out;
    }
};

Parallel on_threads(int threads) {
    return {threads, [threads](const std::function<void()>& f) {
                std::vector<std::thread> others;
                for (int i = 1; i < threads; ++i) others.emplace_back(f);
                f();
                for (std::thread& other : others) other.join();
            }};
}

// Puts the rows of a matrix where an index has them, between rows of NaN.
std::vector<float> spread(const std::vector<float>& rows, int64_t count, int64_t d) {
    std::vector<float> all(2 * count * d, std::numeric_limits<float>::quiet_NaN());
    for (int64_t j = 0; j < count; ++j)
        std::copy(rows.begin() + j * d, rows.begin() + (j + 1) * d, all.begin() + (2 * j + 1) * d);
    return all;
}

// The operands of a case and the gradients that arrive, some of them negative.
struct Inputs {
    const Case& one;
    Stored x, w;   // w without the rows that are not swept
    Stored all_w;  // w as the sweep has it
    std::vector<float> bias;
    std::vector<int64_t> y, index;
    std::vector<float> a, target, u, grad_w_norm;
    float scale;

    explicit Inputs(const Case& one) : Inputs(one, normal(one.c * one.d)) {}

    Inputs(const Case& one, const std::vector<float>& rows)
        : one(one),
          x(normal(one.n * one.d), one.n, one.d, one.x_type),
          w(rows, one.c, one.d, one.w_type),
          all_w(one.index ? spread(rows, one.c, one.d) : rows, one.index ? 2 * one.c : one.c, one.d,
                one.w_type),
          bias(normal(one.c)),
          y(one.n * one.targets),
          scale(one.normalize_x && one.normalize_w ? 16 : 0.5) {
        const int64_t all = one.n * one.targets;
        for (int64_t t = 0; t < all; ++t) y[t] = t % 5 == 4 ? -1 : int64_t(generator() % one.c);
        if (one.targets > 1)  // a target may come twice
            for (int64_t t = 0; t < all; t += 3 * one.targets) y[t + 1] = y[t];
        a = normal(one.n), target = normal(all), u = normal(one.n, 1e-3F);
        grad_w_norm = normal(all);
        for (int64_t j = 0; j < one.c && one.index; ++j) index.push_back(row(j));
    }

    // Returns the row of all_w that a swept class is.
    int64_t row(int64_t j) const { return one.index ? 2 * j + 1 : j; }
    int64_t rows() const { return one.index ? 2 * one.c : one.c; }

    // Returns the call for these rows of w.
    Call call(const Stored& w) const {
        Call call = {};
        call.x = {x.data(), x.stride, one.x_type};
        call.w = {w.data(), w.stride, one.w_type};
        call.index = one.index ? index.data() : nullptr;
        call.y = y.data();
        call.targets = one.targets, call.centers = one.centers;
        call.transform = transform_of(one);
        std::copy(std::begin(kConstants), std::end(kConstants), call.constants);
        call.bias = one.bias ? bias.data() : nullptr;
        call.scale = scale;
        call.normalize_x = one.normalize_x;
        call.normalize_w = one.normalize_w;
        call.compute = one.compute;
        call.n = one.n, call.c = one.c, call.d = one.d;
        return call;
    }
};

// What memory a sweep keeps its exponentials in, aligned as tensors are.
struct Tiles {
    void* const memory;

    explicit Tiles(const Case& one)
        : memory(one.tiles
                     ? std::aligned_alloc(
                           64, round_up_to(one.c * round_up_to(one.n, mk::kTilePadding) * 4, 64))
                     : nullptr) {}
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { std::free(memory); }
};

// The results of the two sweeps.
struct Results {
    const Inputs& in;
    Tiles tiles;
    std::vector<float> lse, target_cosine, w_norm, logit_sum, logit_max, x_inv, w_inv, dbias;
    Output dx, dw;
    double dscale = 0;

    explicit Results(const Inputs& in)
        : in(in),
          tiles(in.one),
          lse(in.one.n),
          target_cosine(in.y.size()),
          w_norm(in.y.size()),
          logit_sum(in.one.n),
          logit_max(in.one.n),
          x_inv(in.one.n),
          w_inv(in.one.c),
          dbias(in.one.c),
          dx(in.one.n * in.one.d, in.one.x_type),
          dw(in.rows() * in.one.d, in.one.w_type) {
        const bool extras = in.one.extras;
        ForwardResults results = {};
        results.lse = lse.data(), results.target_cosine = target_cosine.data();
        results.w_norm = w_norm.data();
        results.logit_sum = extras ? logit_sum.data() : nullptr;
        results.logit_max = extras ? logit_max.data() : nullptr;
        results.x_inv = x_inv.data(), results.w_inv = w_inv.data();
        results.tiles = tiles.memory;
        sweep_forward(in.call(in.all_w), results, on_threads(2));
        const std::vector<float> lse_before = lse, w_inv_before = w_inv;
        results.w_inv_is_known = true;
        sweep_forward(in.call(in.all_w), results, on_threads(2));
        if (lse != lse_before || w_inv != w_inv_before) lse.assign(in.one.n, NAN);
        backward(in.all_w, dw.data(), nullptr, 2);
    }

    // Makes the backward sweep, with dw or with an update of w.
    void backward(const Stored& w, void* dw, const Update* update, int threads) {
        const bool extras = in.one.extras, with_sum = extras && !in.one.one_versus_rest;
        BackwardResults results = {};
        results.dx = dx.data(), results.dw = dw, results.update = update;
        results.dbias = extras ? dbias.data() : nullptr;
        results.dscale = extras ? &dscale : nullptr;
        sweep_backward(in.call(w),
                       {lse.data(), w_inv.data(), tiles.memory, in.a.data(), in.target.data(),
                        extras ? in.grad_w_norm.data() : nullptr, with_sum ? in.u.data() : nullptr},
                       results, on_threads(threads));
    }

    // Returns dw of the classes that are swept.
    Matrix swept_dw() const {
        const Matrix all = dw.values();
        Matrix swept;
        for (int64_t j = 0; j < in.one.c; ++j)
            for (int64_t k = 0; k < in.one.d; ++k) swept.push_back(all[in.row(j) * in.one.d + k]);
        return swept;
    }
};

}  // namespace
