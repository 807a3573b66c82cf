// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The CPU sweeps without torch, against the same sums written out in fp64: for sanitizers, for
// emulated instruction sets (-DMK_EMULATE) and for cross-compilers. `make sanitize` runs it for
// every instruction set; the exit status is the number of cases that fail.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/schedule.h"

using namespace marginkernels;

namespace {

using Matrix = std::vector<double>;

struct Case {
    int64_t n, c, d;
    Type compute;
    Type x_type, w_type;
    bool normalize_x, normalize_w, bias, tiles, extras;
};

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
    double at(int64_t i, int64_t k, Type compute) const {
        const float value =
            type == Type::kFloat32 ? wide[i * stride + k] : bf16_value(half[i * stride + k]);
        return compute == Type::kBFloat16 ? bf16_value(bf16_bits(value)) : value;
    }
};

// Output in a type, read back as double.
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

// largest row error over the largest row norm, or over 1e-3 where all is smaller
double relative_error(const Matrix& got, const Matrix& want, int64_t width) {
    double worst = 0, largest = 1e-6;
    for (size_t at = 0; at < want.size(); at += width) {
        double error = 0, norm = 0;
        for (int64_t k = 0; k < width; ++k) {
            error += std::pow(got[at + k] - want[at + k], 2);
            norm += std::pow(want[at + k], 2);
        }
        if (!(error <= worst)) worst = error;  // NaN stays
        largest = std::max(largest, norm);
    }
    return std::sqrt(worst / largest);
}

template <class T>
Matrix wide(const std::vector<T>& values) {
    return Matrix(values.begin(), values.end());
}

const Parallel two_threads = {2, [](const std::function<void()>& f) {
                                  std::thread other(f);
                                  f();
                                  other.join();
                              }};

bool run(const Case& one) {
    const auto [n, c, d, compute, x_type, w_type, normalize_x, normalize_w, has_bias, tiles,
                extras] = one;
    const float scale = normalize_x && normalize_w ? 16 : 0.5;
    const Stored x(normal(n * d), n, d, x_type), w(normal(c * d), c, d, w_type);
    const std::vector<float> bias = normal(c);
    std::vector<int64_t> y(n);
    for (int64_t i = 0; i < n; ++i) y[i] = i % 5 == 4 ? -1 : int64_t(generator() % c);
    // upstream gradients; a negative one too
    const std::vector<float> a = normal(n), target = normal(n), u = normal(n, 1e-3F);
    const std::vector<float> grad_w_norm = normal(n);

    Sweep s = {};
    s.x = {x.data(), x.stride, x_type};
    s.w = {w.data(), w.stride, w_type};
    s.y = y.data();
    s.bias = has_bias ? bias.data() : nullptr;
    s.scale = scale;
    s.normalize_x = normalize_x;
    s.normalize_w = normalize_w;
    s.compute = compute;
    s.n = n, s.c = c, s.d = d;
    std::vector<float> x_inv(n), w_inv(c), lse(n), target_logit(n), w_norm(n), logit_sum(n),
        logit_max(n);
    // aligned as tensors are
    const size_t tile_bytes = c * round_up_to(n, mk::kTilePadding) * 4;
    void* const tile_memory = std::aligned_alloc(64, round_up_to(tile_bytes, 64));
    s.x_inv = x_inv.data(), s.w_inv = w_inv.data(), s.tiles = tiles ? tile_memory : nullptr;
    s.d_out = target_logit.data(), s.w_norm = w_norm.data();
    s.want_sum = s.want_max = extras;
    forward(s, {lse.data(), logit_sum.data(), logit_max.data()}, two_threads);

    Output dx(n * d, x_type), dw(c * d, w_type);
    std::vector<float> dbias(c);
    s.target = target.data();
    s.grad_w_norm = extras ? grad_w_norm.data() : nullptr;
    s.need_x = s.need_w = true;
    s.need_bias = s.need_scale = extras;
    s.dx = dx.data(), s.dw = dw.data(), s.dbias = dbias.data();
    const double dscale =
        backward(s, {lse.data(), a.data(), extras ? u.data() : nullptr}, two_threads);
    std::free(tile_memory);

    // the same, dense and in fp64
    const auto norm = [&](const Stored& rows, int64_t i) {
        double total = 0;
        for (int64_t k = 0; k < d; ++k) total += std::pow(rows.at(i, k, compute), 2);
        return std::sqrt(total);
    };
    Matrix want_lse(n), want_d(n, 0), want_norm(n, 0), want_sum(n, 0), want_max(n);
    Matrix t_x(n * d, 0), t_w(c * d, 0), want_dbias(c, 0);
    double want_dscale = 0;
    for (int64_t i = 0; i < n; ++i) {
        Matrix z(c), factor(c);
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int64_t j = 0; j < c; ++j) {
            double product = 0;
            for (int64_t k = 0; k < d; ++k) product += x.at(i, k, compute) * w.at(j, k, compute);
            factor[j] = (normalize_x ? 1 / norm(x, i) : 1) * (normalize_w ? 1 / norm(w, j) : 1);
            if (j == y[i]) want_d[i] = factor[j] * product, want_norm[i] = norm(w, j);
            z[j] = scale * factor[j] * product + (has_bias ? bias[j] : 0);
            if (j != y[i]) largest = std::max(largest, z[j]), want_sum[i] += z[j];
        }
        for (int64_t j = 0; j < c; ++j) total += j == y[i] ? 0 : std::exp(z[j] - largest);
        want_max[i] = largest;
        want_lse[i] = std::isinf(largest) ? largest : largest + std::log(total);
        for (int64_t j = 0; j < c; ++j) {
            double g = target[i];
            if (j != y[i]) {
                g = a[i] * std::exp(z[j] - want_lse[i]) + (extras ? u[i] : 0);
                want_dbias[j] += g;
                want_dscale += g * (z[j] - (has_bias ? bias[j] : 0)) / scale;
            }
            for (int64_t k = 0; k < d; ++k) {
                t_x[i * d + k] += g * scale * factor[j] * w.at(j, k, compute);
                t_w[j * d + k] += g * scale * factor[j] * x.at(i, k, compute);
            }
        }
    }
    const auto project = [&](Matrix& t, const Stored& rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            double radial = 0;
            for (int64_t k = 0; k < d; ++k) radial += t[i * d + k] * rows.at(i, k, compute);
            radial /= std::pow(norm(rows, i), 2);
            for (int64_t k = 0; k < d; ++k) t[i * d + k] -= radial * rows.at(i, k, compute);
        }
    };
    if (normalize_x) project(t_x, x, n);
    if (normalize_w) project(t_w, w, c);
    for (int64_t i = 0; i < n && extras; ++i)
        for (int64_t k = 0; k < d && y[i] >= 0; ++k)
            t_w[y[i] * d + k] += grad_w_norm[i] * w.at(y[i], k, compute) / norm(w, y[i]);

    bool good = true;
    const double fine = 2e-5, coarse = compute == Type::kBFloat16 ? 1e-2 : 2e-5;
    const auto check = [&](const char* name, const Matrix& got, const Matrix& want, int64_t width,
                           double bound) {
        const double error = relative_error(got, want, width);
        if (error <= bound) return;
        good = false;
        std::printf("  %s: relative error %.2g, at most %.2g\n", name, error, bound);
    };
    for (int64_t i = 0; i < n; ++i)  // no negatives: -inf in both
        if (std::isinf(want_lse[i]) && lse[i] == want_lse[i]) want_lse[i] = lse[i] = 0;
    check("lse", wide(lse), want_lse, 1, fine);
    check("d", wide(target_logit), want_d, 1, fine);
    check("w_norm", wide(w_norm), want_norm, 1, fine);
    check("dx", dx.values(), t_x, d, x_type == Type::kBFloat16 ? 1e-2 : coarse);
    check("dw", dw.values(), t_w, d, w_type == Type::kBFloat16 ? 1e-2 : coarse);
    if (extras) {
        if (c > 1) check("logit_max", wide(logit_max), want_max, 1, fine);
        check("logit_sum", wide(logit_sum), want_sum, 1, fine);
        check("dbias", wide(dbias), want_dbias, 1, 1e-4);
        check("dscale", {dscale}, {want_dscale}, 1, 1e-3);
    }
    return good;
}

}  // namespace

int main() {
    constexpr Type f = Type::kFloat32, b = Type::kBFloat16;
    const Case cases[] = {
        {1, 1, 2, f, f, f, true, true, false, false, false},
        {1, 1, 3, b, f, f, true, true, false, true, false},
        {5, 7, 31, f, f, f, true, true, false, true, false},
        {37, 301, 48, f, f, f, true, true, false, false, true},
        {37, 301, 48, b, b, f, true, true, false, false, true},
        {19, 260, 500, f, f, b, true, true, false, true, false},
        {70, 131, 513, b, f, f, true, true, false, true, false},
        {300, 257, 40, f, f, f, true, true, false, true, false},
        {300, 257, 40, b, f, f, true, true, false, true, false},
        {530, 129, 17, b, b, b, true, true, false, false, false},
        {23, 210, 33, f, f, f, false, true, true, false, true},
        {23, 210, 33, b, f, f, false, false, true, false, true},
        {23, 210, 33, f, f, f, false, false, false, false, false},
    };
    int failed = 0, passed = 0;
    for (const Case& one : cases) {
        const bool good = run(one);
        ++(good ? passed : failed);
        if (!good)
            std::printf("FAILED: (N, C, D) = (%ld, %ld, %ld), compute %s\n", long(one.n),
                        long(one.c), long(one.d), one.compute == b ? "bf16" : "fp32");
    }
    std::printf("%s: %d passed, %d failed\n", cpu_capability(), passed, failed);
    return failed;
}
