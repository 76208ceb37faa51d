// Passes over a row of logits: its maximum, its blocks' maxima, whether it can be used at all; and
// its mass.
#pragma once
#include "core/mass_lanes.h"

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

// The mass of a row whose maximum is `top`. With the blocks' maxima, blocks without any are not
// read.
inline uint64_t total_mass(const float* row, const float* block_max, int64_t vocab, float top) {
    const V16 t = splat(top);
    MassSum sum;
    int num_added = 0;
    const int64_t whole = vocab / kBlock * kBlock;
    for (int64_t start = 0; start < whole; start += kBlock) {
        if (block_max && block_max[start / kBlock] - top < -28.0f) continue;
        for (int i = 0; i < kBlock; i += 16) sum.add(sub(load(row + start + i), t));
        if (++num_added % (kMassSteps / (kBlock / 16)) == 0) sum.flush();
    }
    sum.flush();
    for (int64_t v = whole; v < vocab; ++v) sum.total += mass_of(row[v] - top);
    return sum.total;
}

}  // namespace specrt::SPECRT_ISA
