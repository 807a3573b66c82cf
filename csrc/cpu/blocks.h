// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The classes of a stripe, one block after the other, as both sweeps read and multiply them. One
// block of classes by a block of rows of logits exists at a time. It is transposed, (class, row),
// so that statistics of a row are sums of vectors. W is read once forward and once backward, and dw
// is written once.

#pragma once

#include "gemm.h"
#include "rows.h"

namespace marginkernels {
namespace {

constexpr int64_t kBlockRows = 256;  // of x, per block of logits: a multiple of kPanel
// rows of a block are this much longer, so that columns do not fall into one set of the cache
constexpr int64_t kSkew = 16;
constexpr int64_t kLogitsStride = kBlockRows + kSkew;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Some classes, by some rows of x.
struct Block {
    int64_t first, count;  // classes [first, first + count)
    int64_t begin, rows;   // rows [begin, begin + rows) of padded_n
};

// The memory that one thread works in.
struct Scratch {
    int64_t class_stride;  // padded_d + kSkew
    float* rounded;        // (block_classes, class_stride) the classes' rows
    uint16_t* halves;      // the same as bf16, (block_classes, 2 * class_stride)
    float* q;              // (block_classes,) 1 / |w_j|, or 1
    float* panels;         // the classes' rows once more, operand of dx
    float* logits;         // (block_classes, kLogitsStride), then exponentials, then G
    uint16_t* g_rows;      // G as bf16, (block_classes, 2 * kLogitsStride)
    float* g_pairs;        // and with two classes to a unit, (block_classes / 2, kLogitsStride)
    float* dw;             // (block_classes, padded_d)
    float* dbias;          // (block_classes, kLanes)
    float* radial;         // (block_classes,)
    float* copies;         // (1 + mk::kMostStates, padded_d) a row of w and its states
    uint32_t* words[1 + mk::kMostStates / 2];  // random, (padded_d and up to one vector more)
    Ahead ahead;                               // what the next block reads
};

// Hands out arrays from a piece of memory, or without one counts their bytes.
struct Arena {
    char* base;
    size_t used = 0;

    template <class T>
    void take(T*& array, int64_t count) {
        array = reinterpret_cast<T*>(base + used);
        used += round_up(count * sizeof(T), 64);
    }
};

// Lays the arrays out from ``base`` on; returns how many bytes they take.
size_t lay_out(const Plan& plan, bool backward, void* base, Scratch& scratch) {
    Arena arena{static_cast<char*>(base)};
    const int64_t classes = plan.block_classes;
    scratch.class_stride = plan.padded_d + kSkew;
    arena.take(scratch.rounded, classes * scratch.class_stride);
    arena.take(scratch.halves, classes * 2 * scratch.class_stride);
    arena.take(scratch.q, classes);
    arena.take(scratch.logits, classes * kLogitsStride);
    if (!backward) return arena.used;
    arena.take(scratch.panels, classes * plan.padded_d);
    arena.take(scratch.g_rows, classes * 2 * kLogitsStride);
    arena.take(scratch.g_pairs, classes * kLogitsStride);
    arena.take(scratch.dw, classes * plan.padded_d);
    arena.take(scratch.dbias, classes * kLanes);
    arena.take(scratch.radial, classes);
    arena.take(scratch.copies, (1 + mk::kMostStates) * plan.padded_d);
    for (uint32_t*& words : scratch.words) arena.take(words, plan.padded_d + kLanes);
    return arena.used;
}

size_t scratch_bytes(const Plan& plan, bool backward) {
    Scratch scratch;
    return lay_out(plan, backward, nullptr, scratch);
}

// Returns the row of w that a swept class is.
MK_HOST_DEVICE int64_t row_of(const Problem& s, int64_t j) {
    return s.index == nullptr ? j : s.index[j];
}

// Calls f(place in y, row, class - block.first) for the targets of the block's rows that are among
// its classes.
template <class F>
MK_HOST_DEVICE void for_targets(const Problem& s, const Block& block, const F& f) {
    const int64_t end = smaller(block.begin + block.rows, s.n) * s.targets;
    for (int64_t t = block.begin * s.targets; t < end; ++t)
        if (s.y[t] >= block.first && s.y[t] < block.first + block.count)
            f(t, t / s.targets, s.y[t] - block.first);
}

// Calls f(first class, count, end of the next block) for the blocks of classes of one stripe.
template <class F>
MK_HOST_DEVICE void for_classes(const Problem& s, int64_t stripe, const F& f) {
    const int64_t blocks = (s.c + s.block_classes - 1) / s.block_classes;
    const int64_t end = smaller(blocks * (stripe + 1) / s.stripes * s.block_classes, s.c);
    for (int64_t first = blocks * stripe / s.stripes * s.block_classes; first < end;
         first += s.block_classes)
        f(first, smaller(s.block_classes, end - first), smaller(first + 2 * s.block_classes, end));
}

// Calls f(block) for the blocks of rows that these classes meet.
template <class F>
MK_HOST_DEVICE void for_rows(const Problem& s, int64_t first, int64_t count, const F& f) {
    for (int64_t begin = 0; begin < s.padded_n; begin += kBlockRows)
        f(Block{first, count, begin, smaller(kBlockRows, s.padded_n - begin)});
}

// x in the two forms that blocks of classes are multiplied with

template <class Op>
Panels logit_panels(const Problem& s) {
    return {s.x_panels, s.padded_d / Op::kPerUnit, s.padded_n};
}

template <class Op>
Panels gradient_panels(const BackwardSweep& s) {
    return {s.gradient_panels, s.padded_n / Op::kPerUnit, s.padded_d};
}

template <class Op>
void prepare_rows(const Problem& s, int64_t p) {
    const Panels panels = logit_panels<Op>(s);
    const int64_t width = panels.width(p);
    float* out = const_cast<float*>(panels.at(p, 0));
    for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t i = p * kPanel + lane;
        float* row = s.x_rows + i * s.padded_d;
        if (i < s.n) {
            read_row(s, s.x, i, s.compute, row);
            const float norm = mk::inverse_norm(dot(row, row, s.padded_d), least_norm(s.compute));
            s.x_inv[i] = s.normalize_x ? norm : 1.0F;
            s.row_scale[i] = s.scale * s.x_inv[i];
        } else {
            memset(row, 0, s.padded_d * sizeof(float));
            s.row_scale[i] = 1.0F;
        }
        for (int64_t k = 0; k < panels.depth; ++k) {
            if constexpr (Op::kPerUnit == 1)
                out[k * width + lane] = row[k];
            else
                out[k * width + lane] = bf16_unit(row[2 * k], row[2 * k + 1]);
        }
    }
}

template <class Op>
void prepare_gradient(const BackwardSweep& s, int64_t p) {
    const Panels panels = gradient_panels<Op>(s);
    const int64_t width = panels.width(p);
    // with tiles row_weight may be near the end of fp32's range: the scale then comes last, in
    // finish_dw
    const float unscale = s.tiles != nullptr ? 1.0F / s.scale : 1.0F;
    const auto scaled = [&](int64_t i, int64_t column) {
        const float* row = s.x_rows + i * s.padded_d + p * kPanel;
        const vfloat value = s.row_scale[i] * unscale * load(row + column) * s.row_weight[i];
        return Op::kPerUnit == 1 ? value : round_to_bf16(value);
    };
    for (int64_t k = 0; k < panels.depth; ++k) {
        float* out = const_cast<float*>(panels.at(p, k));
        for (int64_t column = 0; column < width; column += kLanes) {
            if constexpr (Op::kPerUnit == 1)
                store(out + column, scaled(k, column));
            else
                store(out + column, bf16_units(scaled(2 * k, column), scaled(2 * k + 1, column)));
        }
    }
}

// w, one block of classes

// Reads the rows of the classes, rounded. Where w_inv_out is given, their inverse norms are
// measured and go there; else s.w_inv has them.
template <class Op>
void read_classes(const Problem& s, int64_t first, int64_t count, float* w_inv_out,
                  Scratch& scratch) {
    for (int64_t j = 0; j < count; ++j) {
        float* row = scratch.rounded + j * scratch.class_stride;
        read_row(s, s.w, row_of(s, first + j), s.compute, row);
        if (w_inv_out != nullptr)
            w_inv_out[first + j] =
                mk::inverse_norm(dot(row, row, s.padded_d), least_norm(s.compute));
        scratch.q[j] = s.normalize_w ? s.w_inv[first + j] : 1.0F;
        if constexpr (Op::kPerUnit == 2)
            narrow(row, s.padded_d, scratch.halves + j * 2 * scratch.class_stride);
    }
}

// Lets the products of a block ask for classes [next, end), which the next block reads. They are
// asked for by the time that one product is done.
template <class Op>
Ahead look_ahead(const Problem& s, int64_t next, int64_t end) {
    if (s.padded_n == 0) return {};  // there are no products
    const int64_t size = size_of(s.w.type);
    Ahead ahead;
    ahead.data = static_cast<const char*>(s.w.data);
    ahead.bytes = s.d * size;
    ahead.stride = s.w.stride * size;
    ahead.index = s.index;
    ahead.next = next;
    ahead.end = end;
    const int64_t lines = kTileRows * (ahead.bytes + Ahead::kLine - 1) / Ahead::kLine;
    const int64_t tiles = (s.padded_n + kPanel - 1) / kPanel *
                          ((s.padded_d + kDepth * Op::kPerUnit - 1) / (kDepth * Op::kPerUnit));
    ahead.lines_per_tile = (lines + tiles - 1) / tiles;
    return ahead;
}

// Lays the classes of the block out as operand of dx: [panel][class][feature]
template <class Op>
Panels pack_classes(const Problem& s, int64_t count, Scratch& scratch) {
    const int64_t stride = scratch.class_stride;
    if (count % Op::kPerUnit != 0)  // the last unit of two classes is half empty
        memset(scratch.rounded + count * stride, 0, s.padded_d * sizeof(float));
    const Panels panels = {scratch.panels, (count + Op::kPerUnit - 1) / Op::kPerUnit, s.padded_d};
    for (int64_t p = 0; p < panels.count(); ++p) {
        for (int64_t k = 0; k < panels.depth; ++k) {
            const float* row = scratch.rounded + k * Op::kPerUnit * stride + p * kPanel;
            float* out = const_cast<float*>(panels.at(p, k));
            for (int64_t column = 0; column < panels.width(p); column += kLanes) {
                if constexpr (Op::kPerUnit == 1)
                    store(out + column, load(row + column));
                else
                    store(out + column,
                          bf16_units(load(row + column), load(row + stride + column)));
            }
        }
    }
    return panels;
}

// Leaves of each class the centre with the greatest logit before the bias, the first of equals, and
// takes the others out of the block.
void leave_best_centers(const Problem& s, const Block& block, const Scratch& scratch) {
    const int32_t centers = s.centers;
    for (int64_t j = 0; j < block.count; j += centers) {
        const float* const q = scratch.q + j;
        for (int64_t column = 0; column < block.rows; column += kLanes) {
            float* const logits = scratch.logits + j * kLogitsStride + column;
            vfloat greatest = load(logits) * q[0];
            vint best = {};
            for (int32_t k = 1; k < centers; ++k) {
                const vfloat product = load(logits + k * kLogitsStride) * q[k];
                best = product > greatest ? k - vint{} : best;
                greatest = max(product, greatest);
            }
            for (int32_t k = 0; k < centers; ++k) {
                float* const logit = logits + k * kLogitsStride;
                store(logit, best == k ? load(logit) : splat(-INFINITY));
            }
        }
    }
}

// Computes <x_i, w_j> of the block, transposed; of a class with several centres only the greatest.
template <class Op>
void multiply_logits(const Problem& s, const Block& block, Scratch& scratch) {
    const float* classes =
        Op::kPerUnit == 1 ? scratch.rounded : reinterpret_cast<const float*>(scratch.halves);
    const int64_t depth = (s.d + Op::kPerUnit - 1) / Op::kPerUnit;
    multiply<Op, false>(block.count, classes, scratch.class_stride, logit_panels<Op>(s),
                        block.begin / kPanel, (block.rows + kPanel - 1) / kPanel, 0, depth,
                        scratch.logits, kLogitsStride, false, scratch.ahead);
    if (s.centers > 1) leave_best_centers(s, block, scratch);
}

// Takes the class of a target of row i out of the block, with all its centres.
MK_HOST_DEVICE void exclude_target(const Problem& s, const Block& block, int64_t i, int64_t j,
                                   const Scratch& scratch) {
    const int64_t first = j / s.centers * s.centers;
    for (int64_t k = first; k < first + s.centers; ++k)
        scratch.logits[k * kLogitsStride + i - block.begin] = -INFINITY;
}

}  // namespace
}  // namespace marginkernels
