// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The backward sweep of one stripe: the logits again (or the exponentials that forward kept), G in
// their place, and from G the stripe's part of dx and the final dw of its classes, which is written
// out or moves them. The targets' gradients are added outside the products, in fp32.

#pragma once

#include "forward.h"
#include "update_rows.h"

namespace marginkernels {
namespace {

// Computes G_ij q_j of a vector of rows in place of the logits, without the row factor.
void make_gradient(const BackwardSweep& s, const Block& block, int64_t column,
                   const Scratch& scratch, Bias bias) {
    const int64_t row = block.begin + column;
    const vfloat a = load(s.a + row);
    const vfloat lse = max(load(s.lse + row), splat(mk::kNoMaximum));
    for_logits(s, mk::Identity(), block, column, scratch, bias,
               [&](int64_t j, float* at, vfloat z, vfloat, vfloat) {
                   store(at, a * mk::exp(z - lse) * scratch.q[j]);
               });
}

// Computes the same where more is asked than dx and dw of a plain cross-entropy. Returns the sum of
// G z over the vector of rows, with G before the slope is multiplied in.
template <class Functor>
float make_gradient_and_sums(const BackwardSweep& s, Functor functor, const Block& block,
                             int64_t column, const Scratch& scratch, Bias bias) {
    const int64_t row = block.begin + column;
    const vfloat a = load(s.a + row);
    const vfloat u = s.u == nullptr ? vfloat{} : load(s.u + row);
    const vfloat lse = max(load(s.lse + row), splat(mk::kNoMaximum));
    vfloat weighted = {};
    for_logits(s, functor, block, column, scratch, bias,
               [&](int64_t j, float* at, vfloat z, vfloat unbiased, vfloat slope) {
                   const auto there = unbiased > mk::kNoMaximum;
                   vfloat p;
                   if constexpr (Functor::kOneVersusRest)
                       p = softplus_of(z).slope;
                   else
                       p = mk::exp(z - lse);
                   const vfloat g = there ? a * p + u : vfloat{};
                   weighted = g * (there ? unbiased : vfloat{}) + weighted;
                   float* dbias = scratch.dbias + j * kLanes;
                   store(dbias, load(dbias) + g);
                   store(at, g * slope * scratch.q[j]);
               });
    return sum(weighted);
}

// Whether nothing is asked but dx and dw of a plain cross-entropy.
bool is_plain(const BackwardSweep& s) {
    return s.u == nullptr && s.dbias == nullptr && s.stripe_dscale == nullptr &&
           s.transform == Transform::kIdentity;
}

void load_tiles(const BackwardSweep& s, const Block& block, const Scratch& scratch) {
    for (int64_t j = 0; j < block.count; ++j) {
        float* to = scratch.logits + j * kLogitsStride;
        const int64_t from = (block.first + j) * s.padded_n + block.begin;
        if (s.compute == Type::kFloat32)
            for (int64_t i = 0; i < block.rows; i += kLanes)
                store(to + i, load_as<Type::kFloat32>(s.tiles, from + i));
        else
            for (int64_t i = 0; i < block.rows; i += kLanes)
                store(to + i, load_as<Type::kBFloat16>(s.tiles, from + i));
    }
}

// Puts G q_j of the block in place of its logits, and adds the sum of G z where that is asked for.
template <class Op>
void fill_gradient(const BackwardSweep& s, const Block& block, Scratch& scratch, double& weighted) {
    if (s.tiles != nullptr) return load_tiles(s, block, scratch);
    multiply_logits<Op>(s, block, scratch);
    for_targets(s, block,
                [&](int64_t, int64_t i, int64_t j) { exclude_target(s, block, i, j, scratch); });
    const Bias bias = bias_of(s, block.first);
    if (is_plain(s))
        for (int64_t column = 0; column < block.rows; column += kLanes)
            make_gradient(s, block, column, scratch, bias);
    else
        mk::visit(s.transform, [&](auto functor) {
            for (int64_t column = 0; column < block.rows; column += kLanes)
                weighted += make_gradient_and_sums(s, functor, block, column, scratch, bias);
        });
}

// G of the block in the two forms that the products read: rows of a class, and columns.
struct Gradient {
    const float* rows;
    int64_t rows_stride;  // in units, like the next
    const float* columns;
    int64_t columns_stride;
};

template <class Op>
Gradient format_gradient(const Block& block, const Scratch& scratch) {
    if constexpr (Op::kPerUnit == 1)
        return {scratch.logits, kLogitsStride, scratch.logits, kLogitsStride};
    if (block.count % 2 != 0)
        memset(scratch.logits + block.count * kLogitsStride, 0, block.rows * sizeof(float));
    for (int64_t j = 0; j < block.count; j += 2) {
        const float* first = scratch.logits + j * kLogitsStride;
        const float* second = first + kLogitsStride;
        uint16_t* halves = scratch.g_rows + j * 2 * kLogitsStride;
        float* pairs = scratch.g_pairs + j / 2 * kLogitsStride;
        for (int64_t i = 0; i < block.rows; i += kLanes) {
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

// Adds the block's part to the stripe's part of dx, or sets it where the block is the first one.
template <class Op>
void add_dx(const BackwardSweep& s, const Block& block, const Gradient& g, const Panels& classes,
            float* dx, bool add, Ahead& ahead) {
    const int64_t end = smaller(block.begin + block.rows, s.n);
    multiply<Op, true>(end - block.begin, g.columns, g.columns_stride, classes, 0, classes.count(),
                       0, classes.depth, dx + block.begin * s.padded_d, s.padded_d, add, ahead);
}

// Adds the block's part to dw of its classes, or sets it where the rows are the first ones.
template <class Op>
void add_dw(const BackwardSweep& s, const Block& block, const Gradient& g, Scratch& scratch) {
    const Panels x = gradient_panels<Op>(s);
    multiply<Op, false>(block.count, g.rows, g.rows_stride, x, 0, x.count(),
                        block.begin / Op::kPerUnit, block.rows / Op::kPerUnit, scratch.dw,
                        s.padded_d, block.begin > 0, scratch.ahead);
}

// Completes dw of some classes, and writes it out or moves the classes by it: the targets' part,
// the projection, and the gradient of the norm.
void finish_dw(const BackwardSweep& s, int64_t first, int64_t count, const Scratch& scratch) {
    if (s.tiles != nullptr)
        for (int64_t k = 0; k < count * s.padded_d; k += kLanes)
            store(scratch.dw + k, s.scale * load(scratch.dw + k));
    if (s.n == 0) memset(scratch.dw, 0, count * s.padded_d * sizeof(float));
    const WritableRows dw = {s.dw, s.d, s.w.type};
    memset(scratch.radial, 0, count * sizeof(float));
    for_targets(s, Block{first, count, 0, s.n}, [&](int64_t t, int64_t i, int64_t j) {
        const float factor = s.grad_target[t] * s.row_scale[i] * scratch.q[j];
        add_scaled(scratch.dw + j * s.padded_d, factor, s.x_rows + i * s.padded_d, s.padded_d);
        if (s.grad_w_norm != nullptr) scratch.radial[j] += s.grad_w_norm[t];
    });
    for (int64_t j = 0; j < count; ++j) {
        float* gradient = scratch.dw + j * s.padded_d;
        const float* row = scratch.rounded + j * scratch.class_stride;
        const float inverse = s.w_inv[first + j];
        if (s.normalize_w) project(gradient, row, inverse, s);
        if (scratch.radial[j] != 0 && !is_zero_row(inverse, s.compute))
            add_scaled(gradient, scratch.radial[j] * inverse, row, s.padded_d);
        if (s.update == nullptr) write_row(dw, row_of(s, first + j), s.d, gradient);
    }
    if (s.update != nullptr) update_rows(s, *s.update, first, count, scratch.dw, scratch);
}

template <class Op>
void backward_stripe(const BackwardSweep& s, int64_t stripe, void* memory) {
    Scratch scratch;
    lay_out(s, true, memory, scratch);
    float* dx = s.dx_partial + stripe * s.n * s.padded_d;
    bool started = false;
    double weighted = 0;
    for_classes(s, stripe, [&](int64_t first, int64_t count, int64_t next_end) {
        read_classes<Op>(s, first, count, nullptr, scratch);
        scratch.ahead = look_ahead<Op>(s, first + count, next_end);
        Panels classes = {};
        if (s.dx != nullptr) classes = pack_classes<Op>(s, count, scratch);
        if (!is_plain(s)) memset(scratch.dbias, 0, count * kLanes * sizeof(float));
        for_rows(s, first, count, [&](const Block& block) {
            fill_gradient<Op>(s, block, scratch, weighted);
            const Gradient g = format_gradient<Op>(block, scratch);
            if (s.dx != nullptr) add_dx<Op>(s, block, g, classes, dx, started, scratch.ahead);
            if (s.needs_dw()) add_dw<Op>(s, block, g, scratch);
        });
        started = true;
        if (s.needs_dw()) finish_dw(s, first, count, scratch);
        if (s.dbias != nullptr)
            for (int64_t j = 0; j < count; ++j)
                s.dbias[first + j] = sum(load(scratch.dbias + j * kLanes));
    });
    if (s.stripe_dscale != nullptr) s.stripe_dscale[stripe] = weighted / s.scale;
}

// Reads the row of w that place t of y names, rounded, as the sweep saw it; returns its inverse
// norm.
float read_target(const BackwardSweep& s, int64_t t, float* out) {
    if (s.target_rows == nullptr) {
        read_row(s, s.w, row_of(s, s.y[t]), s.compute, out);
        return s.w_inv[s.y[t]];
    }
    read_row(s, {s.target_rows, s.d, s.w.type}, t, s.compute, out);
    return s.target_inv[t];
}

// Completes rows [begin, end) of dx and writes them out: the stripes' parts in their order, the
// targets' parts, and the projection.
void finish_dx(const BackwardSweep& s, int64_t begin, int64_t end, void* memory) {
    float* gradient = static_cast<float*>(memory);
    float* w_y = gradient + s.padded_d;
    for (int64_t i = begin; i < end; ++i) {
        const float* part = s.dx_partial + i * s.padded_d;
        for (int64_t k = 0; k < s.padded_d; k += kLanes) {
            vfloat total = load(part + k);
            for (int64_t stripe = 1; stripe < s.stripes; ++stripe)
                total += load(part + stripe * s.n * s.padded_d + k);
            store(gradient + k, total * s.row_weight[i] * s.row_scale[i]);
        }
        for (int64_t t = i * s.targets; t < (i + 1) * s.targets; ++t) {
            if (s.y[t] < 0) continue;
            const float inverse = read_target(s, t, w_y);
            const float q = s.normalize_w ? inverse : 1.0F;
            add_scaled(gradient, s.grad_target[t] * s.row_scale[i] * q, w_y, s.padded_d);
        }
        if (s.normalize_x) project(gradient, s.x_rows + i * s.padded_d, s.x_inv[i], s);
        write_row({s.dx, s.d, s.x.type}, i, s.d, gradient);
    }
}

}  // namespace
}  // namespace marginkernels
