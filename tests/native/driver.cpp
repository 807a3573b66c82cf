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
#include "../../csrc/update.h"

using namespace marginkernels;

namespace {

using Matrix = std::vector<double>;

struct Case {
    int64_t n, c, d;
    Type compute;
    Type x_type, w_type;
    bool normalize_x, normalize_w, bias, tiles, extras;
    bool index = false;  // w has twice as many rows, of which every other one is swept
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

// Returns the largest row error over the largest row norm, or over 1e-3 where all is smaller.
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
          y(one.n),
          scale(one.normalize_x && one.normalize_w ? 16 : 0.5) {
        for (int64_t i = 0; i < one.n; ++i) y[i] = i % 5 == 4 ? -1 : int64_t(generator() % one.c);
        a = normal(one.n), target = normal(one.n), u = normal(one.n, 1e-3F);
        grad_w_norm = normal(one.n);
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
          target_cosine(in.one.n),
          w_norm(in.one.n),
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
        const bool extras = in.one.extras;
        BackwardResults results = {};
        results.dx = dx.data(), results.dw = dw, results.update = update;
        results.dbias = extras ? dbias.data() : nullptr;
        results.dscale = extras ? &dscale : nullptr;
        sweep_backward(in.call(w),
                       {lse.data(), w_inv.data(), tiles.memory, in.a.data(), in.target.data(),
                        extras ? in.grad_w_norm.data() : nullptr, extras ? in.u.data() : nullptr},
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

double norm(const Stored& rows, int64_t i, const Case& one) {
    double total = 0;
    for (int64_t k = 0; k < one.d; ++k) total += std::pow(rows.at(i, k, one.compute), 2);
    return std::sqrt(total);
}

// The same results, dense and in fp64.
struct Expected {
    Matrix lse, target_cosine, w_norm, logit_sum, logit_max, dx, dw, dbias;
    double dscale = 0;

    explicit Expected(const Inputs& in) {
        const Case& one = in.one;
        lse.resize(one.n), logit_max.resize(one.n);
        target_cosine.resize(one.n), w_norm.resize(one.n), logit_sum.resize(one.n);
        dx.resize(one.n * one.d), dw.resize(one.c * one.d), dbias.resize(one.c);
        for (int64_t i = 0; i < one.n; ++i) add_row(in, i);
        if (one.normalize_x) project(dx, in.x, one.n, one);
        if (one.normalize_w) project(dw, in.w, one.c, one);
        for (int64_t i = 0; i < one.n && one.extras; ++i)
            for (int64_t k = 0; k < one.d && in.y[i] >= 0; ++k)
                dw[in.y[i] * one.d + k] +=
                    in.grad_w_norm[i] * in.w.at(in.y[i], k, one.compute) / norm(in.w, in.y[i], one);
    }

  private:
    // The statistics of row i, and its gradients as if norms were held fixed.
    void add_row(const Inputs& in, int64_t i) {
        const Case& one = in.one;
        Matrix z(one.c), factor(one.c);
        double largest = -std::numeric_limits<double>::infinity(), total = 0;
        for (int64_t j = 0; j < one.c; ++j) {
            double product = 0;
            for (int64_t k = 0; k < one.d; ++k)
                product += in.x.at(i, k, one.compute) * in.w.at(j, k, one.compute);
            factor[j] = (one.normalize_x ? 1 / norm(in.x, i, one) : 1) *
                        (one.normalize_w ? 1 / norm(in.w, j, one) : 1);
            if (j == in.y[i])
                target_cosine[i] = factor[j] * product, w_norm[i] = norm(in.w, j, one);
            z[j] = in.scale * factor[j] * product + (one.bias ? in.bias[j] : 0);
            if (j != in.y[i]) largest = std::max(largest, z[j]), logit_sum[i] += z[j];
        }
        for (int64_t j = 0; j < one.c; ++j) total += j == in.y[i] ? 0 : std::exp(z[j] - largest);
        logit_max[i] = largest;
        lse[i] = std::isinf(largest) ? largest : largest + std::log(total);
        for (int64_t j = 0; j < one.c; ++j) {
            double g = in.target[i];
            if (j != in.y[i]) {
                g = in.a[i] * std::exp(z[j] - lse[i]) + (one.extras ? in.u[i] : 0);
                dbias[j] += g;
                dscale += g * (z[j] - (one.bias ? in.bias[j] : 0)) / in.scale;
            }
            for (int64_t k = 0; k < one.d; ++k) {
                dx[i * one.d + k] += g * in.scale * factor[j] * in.w.at(j, k, one.compute);
                dw[j * one.d + k] += g * in.scale * factor[j] * in.x.at(i, k, one.compute);
            }
        }
    }

    // Removes the radial part of each row's gradient.
    static void project(Matrix& gradient, const Stored& rows, int64_t count, const Case& one) {
        for (int64_t i = 0; i < count; ++i) {
            double radial = 0;
            for (int64_t k = 0; k < one.d; ++k)
                radial += gradient[i * one.d + k] * rows.at(i, k, one.compute);
            radial /= std::pow(norm(rows, i, one), 2);
            for (int64_t k = 0; k < one.d; ++k)
                gradient[i * one.d + k] -= radial * rows.at(i, k, one.compute);
        }
    }
};

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

// Runs a case; prints each result that is off and returns whether none is.
bool run(const Case& one) {
    const Inputs in(one);
    Results got(in);
    Expected want(in);
    bool good = true;
    const double fine = 2e-5, coarse = one.compute == Type::kBFloat16 ? 1e-2 : 2e-5;
    const auto bound = [&](Type type) { return type == Type::kBFloat16 ? 1e-2 : coarse; };
    const auto check = [&](const char* name, const Matrix& ours, const Matrix& exact, int64_t width,
                           double bound) {
        const double error = relative_error(ours, exact, width);
        if (error <= bound) return;
        good = false;
        std::printf("  %s: relative error %.2g, at most %.2g\n", name, error, bound);
    };
    for (int64_t i = 0; i < one.n; ++i)  // no negatives: -inf in both
        if (std::isinf(want.lse[i]) && got.lse[i] == want.lse[i]) want.lse[i] = got.lse[i] = 0;
    check("lse", wide(got.lse), want.lse, 1, fine);
    check("target_cosine", wide(got.target_cosine), want.target_cosine, 1, fine);
    check("w_norm", wide(got.w_norm), want.w_norm, 1, fine);
    check("dx", got.dx.values(), want.dx, one.d, bound(one.x_type));
    check("dw", got.swept_dw(), want.dw, one.d, bound(one.w_type));
    if (one.extras) {
        if (one.c > 1) check("logit_max", wide(got.logit_max), want.logit_max, 1, fine);
        check("logit_sum", wide(got.logit_sum), want.logit_sum, 1, fine);
        check("dbias", wide(got.dbias), want.dbias, 1, 1e-4);
        check("dscale", {got.dscale}, {want.dscale}, 1, 1e-3);
    }
    run_steps(
        in, got, want.dw,
        [&](const char* name, const Matrix& ours, const Matrix& exact) {
            check(name, ours, exact, one.d, bound(one.w_type));
        },
        [&](const char* name, bool same) {
            if (!same) std::printf("  %s: other bits\n", name);
            good = good && same;
        });
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
        {37, 301, 48, f, f, f, true, true, false, true, false, true},
        {37, 301, 47, b, b, b, true, true, false, false, true, true},
        {0, 40, 20, f, f, f, true, true, false, false, false},
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
