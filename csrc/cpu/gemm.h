// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Computes c = a b or c += a b for blocks that lie in the cache. 6 rows of c by a few vectors stay
// in registers, so that a step of k costs one broadcast per row and one load per vector beside the
// arithmetic.
//
// Everything counts in units of 32 bits: one fp32 number, or two bf16 numbers with consecutive k.

#pragma once

#include "simd.h"

namespace marginkernels {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = MK_TILE_VECTORS;
constexpr int64_t kDepth = MK_DEPTH;               // units of k that a panel is cut into
constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of b that lie together

struct Float32 {
    static constexpr int64_t kPerUnit = 1;

    static MK_HOST_DEVICE vfloat multiply_add(vfloat a, vfloat b, vfloat c) { return a * b + c; }
};

#ifdef MK_BF16
struct BFloat16 {
    static constexpr int64_t kPerUnit = 2;

    static MK_HOST_DEVICE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#ifdef MK_EMULATE
        return high(a) * high(b) + (low(a) * low(b) + c);
#else
        return vfloat(_mm512_dpbf16_ps(__m512(c), __m512bh(a), __m512bh(b)));
#endif
    }

    static MK_HOST_DEVICE vfloat low(vfloat unit) {
        return mk::bit_cast<vfloat>(vuint(mk::bit_cast<vuint>(unit) << 16));
    }

    static MK_HOST_DEVICE vfloat high(vfloat unit) {
        return mk::bit_cast<vfloat>(vuint(mk::bit_cast<vuint>(unit) & 0xffff0000U));
    }
};
#endif

// Rows of memory that will be read soon. Before each tile the product asks for some lines of them,
// so that memory works while the tile is computed.
struct Ahead {
    static constexpr int64_t kLine = 64, kPage = 4096;

    const char* data = nullptr;
    int64_t bytes = 0, stride = 0;   // of a row, and from one to the next
    const int64_t* index = nullptr;  // which rows they are; null: all
    int64_t next = 0, end = 0;       // those left
    int64_t lines_per_tile = 0;
    int64_t done = 0;  // bytes of the next row

    MK_HOST_DEVICE const char* at(int64_t j) const {
        return data + (index == nullptr ? j : index[j]) * stride;
    }

    MK_HOST_DEVICE void ask() {
        for (int64_t line = 0; line < lines_per_tile && next < end; ++line) {
            if (done == 0 && next + 1 < end) touch(at(next + 1));
            __builtin_prefetch(at(next) + done, 0, 2);  // as far as the second cache
            done += kLine;
            if (done < bytes) continue;
            done = 0;
            ++next;
        }
    }

    // Reads a byte of each page, because processors drop a prefetch whose page they do not know.
    MK_HOST_DEVICE void touch(const char* row) const {
        for (int64_t byte = 0; byte < bytes; byte += kPage)
            (void)*static_cast<const volatile char*>(row + byte);
    }
};

// Computes one tile of c, kRows x kVectors, from one panel of b. With kColumns element (i, k) of a
// lies at a[k * lda + i], without it at a[i * lda + k]. The old value of c is added last: long sums
// are sums of shorter ones, which keeps more digits.
template <class Op, int kRows, int kVectors, bool kColumns>
void tile(const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc,
          bool add) {
    vfloat sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = vfloat{};
    for (int64_t k = 0; k < depth; ++k) {
        vfloat columns[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const vfloat row = splat(kColumns ? a[i] : a[i * lda]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                sum[i][v] = Op::multiply_add(row, columns[v], sum[i][v]);
        }
        a += kColumns ? lda : 1;
        b += kVectors * kLanes;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            float* const to = c + i * ldc + v * kLanes;
            store(to, add ? load(to) + sum[i][v] : sum[i][v]);
        }
}

// Computes all rows of c from one panel; the last rows, which fill no tile, have a smaller one.
template <class Op, int kVectors, bool kColumns>
void panel(int64_t rows, const float* a, int64_t lda, const float* b, int64_t depth, float* c,
           int64_t ldc, bool add, Ahead& ahead) {
    const int64_t step = kColumns ? 1 : lda;
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        ahead.ask();
        tile<Op, kTileRows, kVectors, kColumns>(a + i * step, lda, b, depth, c + i * ldc, ldc, add);
    }
    a += i * step;
    c += i * ldc;
    switch (rows - i) {
        case 1: return tile<Op, 1, kVectors, kColumns>(a, lda, b, depth, c, ldc, add);
        case 2: return tile<Op, 2, kVectors, kColumns>(a, lda, b, depth, c, ldc, add);
        case 3: return tile<Op, 3, kVectors, kColumns>(a, lda, b, depth, c, ldc, add);
        case 4: return tile<Op, 4, kVectors, kColumns>(a, lda, b, depth, c, ldc, add);
        case 5: return tile<Op, 5, kVectors, kColumns>(a, lda, b, depth, c, ldc, add);
        default: return;
    }
}

// b in panels of kPanel columns, [panel][depth][column]; the last one may be narrower.
struct Panels {
    const float* data;
    int64_t depth;    // units of k in a panel
    int64_t columns;  // in all, a multiple of kLanes

    int64_t count() const { return (columns + kPanel - 1) / kPanel; }
    int64_t width(int64_t p) const {
        return columns - p * kPanel < kPanel ? columns - p * kPanel : kPanel;
    }
    const float* at(int64_t p, int64_t k) const { return data + p * kPanel * depth + k * width(p); }
};

// Multiplies a by units [k, k + depth) of b, from ``first_panel`` on ``panels`` panels of it. The
// product is added to c, or replaces it. Sums longer than kDepth are cut, so that a panel's part
// stays in the first cache. Tiles ask for what is ``ahead``.
template <class Op, bool kColumns>
void multiply(int64_t rows, const float* a, int64_t lda, const Panels& b, int64_t first_panel,
              int64_t panels, int64_t k, int64_t depth, float* c, int64_t ldc, bool add,
              Ahead& ahead) {
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t vectors = b.width(first_panel + p) / kLanes;
        for (int64_t done = 0; done < depth; done += kDepth) {
            const int64_t part = depth - done < kDepth ? depth - done : kDepth;
            const float* a_part = a + done * (kColumns ? lda : 1);
            const float* b_part = b.at(first_panel + p, k + done);
            float* c_part = c + p * kPanel;
            const bool add_part = add || done > 0;
            if (vectors == kTileVectors)
                panel<Op, kTileVectors, kColumns>(rows, a_part, lda, b_part, part, c_part, ldc,
                                                  add_part, ahead);
            else if (vectors == 1)
                panel<Op, 1, kColumns>(rows, a_part, lda, b_part, part, c_part, ldc, add_part,
                                       ahead);
#if MK_TILE_VECTORS > 2
            else if (vectors == 2)
                panel<Op, 2, kColumns>(rows, a_part, lda, b_part, part, c_part, ldc, add_part,
                                       ahead);
            else
                panel<Op, 3, kColumns>(rows, a_part, lda, b_part, part, c_part, ldc, add_part,
                                       ahead);
#endif
        }
    }
}

}  // namespace
}  // namespace marginkernels
