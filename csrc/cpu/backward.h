// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The backward sweep of one stripe: logits again (or the exponentials that forward kept), G in
// their place, and from G the stripe's part of dx and the final dw of its classes. The target's
// gradient is added outside the products, in fp32.

#pragma once

#include "forward.h"

namespace marginkernels {
namespace {

// G_ij q_j of a vector of rows, less the row factor, in place of the logits.
void make_gradient(const Sweep& s, int64_t row, int64_t column, int64_t count,
                   const Scratch& scratch, Bias bias) {
    const vfloat a = load(s.a + row);
    const vfloat lse = max(load(s.lse + row), splat(mk::kNoMaximum));
    for_logits(s, mk::Identity(), row, column, count, scratch, bias,
               [&](int64_t j, float* at, vfloat z, vfloat, vfloat) {
                   store(at, a * mk::exp(z - lse) * scratch.q[j]);
               });
}

// The same where more is asked than dx and dw of a plain cross-entropy. Returns the sum of G z over
// the vector of rows, before the slope is in G.
template <class T>
float make_gradient_and_sums(const Sweep& s, T transform, int64_t row, int64_t column,
                             int64_t count, const Scratch& scratch, Bias bias) {
    const vfloat a = load(s.a + row);
    const vfloat u = s.u == nullptr ? vfloat{} : load(s.u + row);
    const vfloat lse = max(load(s.lse + row), splat(mk::kNoMaximum));
    vfloat weighted = {};
    for_logits(s, transform, row, column, count, scratch, bias,
               [&](int64_t j, float* at, vfloat z, vfloat unbiased, vfloat slope) {
                   const auto there = unbiased > mk::kNoMaximum;
                   const vfloat g = there ? a * mk::exp(z - lse) + u : vfloat{};
                   weighted = g * (there ? unbiased : vfloat{}) + weighted;
                   float* dbias = scratch.dbias + j * kLanes;
                   store(dbias, load(dbias) + g);
                   store(at, g * slope * scratch.q[j]);
               });
    return sum(weighted);
}

// G of the block as the products take it: as rows (class, row of x) and as columns.
struct Gradient {
    const float* rows;
    int64_t rows_stride;  // in units, like the next
    const float* columns;
    int64_t columns_stride;
};

template <class Op>
Gradient format_gradient(int64_t rows, int64_t count, const Scratch& scratch) {
    if constexpr (Op::kPerUnit == 1)
        return {scratch.logits, kLogitsStride, scratch.logits, kLogitsStride};
    if (count % 2 != 0) memset(scratch.logits + count * kLogitsStride, 0, rows * sizeof(float));
    for (int64_t j = 0; j < count; j += 2) {
        const float* first = scratch.logits + j * kLogitsStride;
        const float* second = first + kLogitsStride;
        uint16_t* halves = scratch.g_rows + j * 2 * kLogitsStride;
        float* pairs = scratch.g_pairs + j / 2 * kLogitsStride;
        for (int64_t i = 0; i < rows; i += kLanes) {
            const vfloat one = round_to_bf16(load(first + i));
            const vfloat two = round_to_bf16(load(second + i));
            store(halves + i, to_bf16(one));
            store(halves + 2 * kLogitsStride + i, to_bf16(two));
            store(pairs + i, bf16_units(one, two));
        }
    }
    return {reinterpret_cast<const float*>(scratch.g_rows), kLogitsStride, scratch.g_pairs,
            kLogitsStride};
}

void load_tiles(const Sweep& s, int64_t begin, int64_t rows, int64_t first, int64_t count,
                const Scratch& scratch) {
    for (int64_t j = 0; j < count; ++j) {
        float* to = scratch.logits + j * kLogitsStride;
        const int64_t from = (first + j) * s.padded_n + begin;
        if (s.compute == Type::kFloat32)
            for (int64_t i = 0; i < rows; i += kLanes)
                store(to + i, load_as<Type::kFloat32>(s.tiles, from + i));
        else
            for (int64_t i = 0; i < rows; i += kLanes)
                store(to + i, load_as<Type::kBFloat16>(s.tiles, from + i));
    }
}

// dw of the block: the targets' part, the projection, the radial part, and out.
void finish_dw(const Sweep& s, int64_t first, int64_t count, const Scratch& scratch) {
    if (s.tiles != nullptr)
        for (int64_t k = 0; k < count * s.padded_d; k += kLanes)
            store(scratch.dw + k, s.scale * load(scratch.dw + k));
    memset(scratch.radial, 0, count * sizeof(float));
    for_targets(s, 0, s.n, first, count, [&](int64_t i, int64_t j) {
        const float factor = s.target[i] * s.row_scale[i] * scratch.q[j];
        add_scaled(scratch.dw + j * s.padded_d, factor, s.x_rows + i * s.padded_d, s.padded_d);
        if (s.grad_w_norm != nullptr) scratch.radial[j] += s.grad_w_norm[i];
    });
    for (int64_t j = 0; j < count; ++j) {
        float* gradient = scratch.dw + j * s.padded_d;
        const float* row = scratch.rounded + j * scratch.class_stride;
        const float inverse = s.w_inv[first + j];
        if (s.normalize_w) project(gradient, row, inverse, s);
        if (scratch.radial[j] != 0 && !is_zero_row(inverse, s.compute))
            add_scaled(gradient, scratch.radial[j] * inverse, row, s.padded_d);
        write_row(s.dw, s.w.type, first + j, s.d, gradient);
    }
}

template <class Op>
void backward(const Sweep& s, int64_t stripe, void* memory) {
    Scratch scratch;
    lay_out(s, true, memory, scratch);
    const bool plain =
        s.u == nullptr && !s.need_bias && !s.need_scale && s.transform == Transform::kIdentity;
    float* dx = s.dx_partial + stripe * s.n * s.padded_d;
    bool started = false;
    double weighted = 0;
    for_blocks(s, stripe, [&](int64_t first, int64_t count) {
        const Bias bias = bias_of(s, first);
        read_classes<Op>(s, first, count, false, scratch);
        Panels classes = {};
        if (s.need_x) classes = pack_classes<Op>(s, count, scratch);
        if (!plain) memset(scratch.dbias, 0, count * kLanes * sizeof(float));
        for (int64_t begin = 0; begin < s.padded_n; begin += kBlockRows) {
            const int64_t rows = smaller(kBlockRows, s.padded_n - begin);
            const int64_t end = smaller(begin + rows, s.n);
            if (s.tiles != nullptr) {
                load_tiles(s, begin, rows, first, count, scratch);
            } else {
                multiply_logits<Op>(s, begin, rows, count, scratch);
                for_targets(s, begin, end, first, count, [&](int64_t i, int64_t j) {
                    scratch.logits[j * kLogitsStride + i - begin] = -INFINITY;
                });
                if (plain)
                    for (int64_t column = 0; column < rows; column += kLanes)
                        make_gradient(s, begin + column, column, count, scratch, bias);
                else
                    mk::visit(s.transform, [&](auto transform) {
                        for (int64_t column = 0; column < rows; column += kLanes)
                            weighted += make_gradient_and_sums(s, transform, begin + column, column,
                                                               count, scratch, bias);
                    });
            }
            const Gradient g = format_gradient<Op>(rows, count, scratch);
            if (s.need_x)
                multiply<Op, true>(end - begin, g.columns, g.columns_stride, classes, 0,
                                   classes.count(), 0, classes.depth, dx + begin * s.padded_d,
                                   s.padded_d, started);
            if (s.need_w) {
                const Panels x = gradient_panels<Op>(s);
                multiply<Op, false>(count, g.rows, g.rows_stride, x, 0, x.count(),
                                    begin / Op::kPerUnit, rows / Op::kPerUnit, scratch.dw,
                                    s.padded_d, begin > 0);
            }
        }
        started = true;
        if (s.need_w) finish_dw(s, first, count, scratch);
        if (s.need_bias)
            for (int64_t j = 0; j < count; ++j)
                s.dbias[first + j] = sum(load(scratch.dbias + j * kLanes));
    });
    s.stripe_dscale[stripe] = weighted / s.scale;
}

// dx of one row: the stripes' parts in their order, the target's, the projection.
void finish_dx(const Sweep& s, int64_t begin, int64_t end, void* memory) {
    float* gradient = static_cast<float*>(memory);
    float* target = gradient + s.padded_d;
    for (int64_t i = begin; i < end; ++i) {
        const float* part = s.dx_partial + i * s.padded_d;
        for (int64_t k = 0; k < s.padded_d; k += kLanes) {
            vfloat total = load(part + k);
            for (int64_t stripe = 1; stripe < s.stripes; ++stripe)
                total += load(part + stripe * s.n * s.padded_d + k);
            store(gradient + k, total * s.row_weight[i] * s.row_scale[i]);
        }
        if (s.y[i] >= 0) {
            read_row(s, s.w, s.y[i], target);
            const float q = s.normalize_w ? s.w_inv[s.y[i]] : 1.0F;
            add_scaled(gradient, s.target[i] * s.row_scale[i] * q, target, s.padded_d);
        }
        if (s.normalize_x) project(gradient, s.x_rows + i * s.padded_d, s.x_inv[i], s);
        write_row(s.dx, s.x.type, i, s.d, gradient);
    }
}

}  // namespace
}  // namespace marginkernels
