// One pass over a row of logits: its maximum, its blocks' maxima, and whether it can be used at
// all.
#pragma once
#include "core/philox.h"
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

constexpr float kInf = __builtin_inff();
constexpr int kBlock = kPhiloxBlock;

struct RowMax {
    float value = -kInf;
    int64_t block = 0;    // the first block that holds it
    bool is_bad = false;  // NaN or +inf somewhere
};

// Maximum of `src`, and of each block if `block_max`; with `dst`, first dst = src / divisor.
inline RowMax scan_row(const float* src, float* dst, float divisor, int64_t vocab,
                       float* block_max) {
    RowMax row;
    const V16 lowest = splat(-3.4028235e38f), d = splat(divisor);
    V16 poison = zero();  // NaN * 0 and inf * 0 are NaN
    for (int64_t start = 0, block = 0; start < vocab; start += kBlock, ++block) {
        const int64_t end = start + kBlock < vocab ? start + kBlock : vocab;
        V16 best = splat(-kInf);
        int64_t i = start;
        for (; i + 16 <= end; i += 16) {
            V16 x = load(src + i);
            if (dst) {
                x = div(x, d);
                store(x, dst + i);
            }
            best = max(best, x);
            poison = fma(max(lowest, x), zero(), poison);
        }
        float top = reduce_max(best);
        for (; i < end; ++i) {
            const float x = dst ? src[i] / divisor : src[i];
            if (dst) dst[i] = x;
            if (x != x || x == kInf) row.is_bad = true;
            top = x > top ? x : top;
        }
        if (block_max) block_max[block] = top;
        if (top > row.value) {
            row.value = top;
            row.block = block;
        }
    }
    const float sum = reduce_add(poison);
    row.is_bad = row.is_bad || sum != sum;
    return row;
}

// The sum of exp(row - top), 256 values at a time in the lanes' tree.
inline double sum_exp(const float* row, int64_t vocab, float top) {
    const V16 t = splat(top);
    double sum = 0.0;
    for (int64_t start = 0; start < vocab; start += 256) {
        V16 part = zero();
        int64_t i = start;
        for (; i + 16 <= vocab && i < start + 256; i += 16)
            part = add(part, exp(sub(load(row + i), t)));
        sum += static_cast<double>(reduce_add(part));
        if (i < vocab && i < start + 256) {
            float rest[16];
            const int n = static_cast<int>(vocab - i);
            store(exp(sub(load_first(row + i, n), t)), rest);
            for (int j = 0; j < n; ++j) sum += static_cast<double>(rest[j]);
        }
    }
    return sum;
}

}  // namespace specrt::SPECRT_ISA
