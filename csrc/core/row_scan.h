// Passes over a row of logits: its maximum, its blocks' maxima, whether it can be used at all; and
// its mass.
#pragma once
#include "core/mass_lanes.h"
#include "core/tile_maxima.h"

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

// Blocks of a row, the last of which may end early: passes over slices of a row add up to those
// over all of it.
struct Blocks {
    int64_t begin, end;
};

inline Blocks all_blocks(int64_t vocab) {
    return {0, (vocab + kBlock - 1) / kBlock};
}

// The mass of a row whose maximum is `top`. With the blocks' maxima, blocks without any are not
// read.
inline uint64_t total_mass(const float* row, const float* block_max, int64_t vocab, float top,
                           Blocks blocks) {
    const V16 t = splat(top);
    MassSum sum;
    int num_added = 0;
    const int64_t last = blocks.end * kBlock;
    const int64_t end = last < vocab ? last : vocab, whole = end / kBlock * kBlock;
    for (int64_t start = blocks.begin * kBlock; start < whole; start += kBlock) {
        if (block_max && block_max[start / kBlock] - top < -28.0f) continue;
        for (int i = 0; i < kBlock; i += 16) sum.add(sub(load(row + start + i), t));
        if (++num_added % (kMassSteps / (kBlock / 16)) == 0) sum.flush();
    }
    sum.flush();
    for (int64_t v = whole; v < end; ++v) sum.total += mass_of(row[v] - top);
    return sum.total;
}

inline uint64_t total_mass(const float* row, const float* block_max, int64_t vocab, float top) {
    return total_mass(row, block_max, vocab, top, all_blocks(vocab));
}

// --- a row's mass by its tiles' (core/tile_maxima.h), which a GPU's blocks leave before the row's
// maximum is known

// Of a tile whose maximum is `best`: the sums of four tokens 16 apart.
inline V16 mass_lanes(const float* tile, float best) {
    const V16 b = splat(best), low = splat(kExpLow);
    V16 e[4];
    for (int r = 0; r < 4; ++r) {
        const V16 below = sub(load(tile + 16 * r), b);
        e[r] = zero_where_less(exp_within(below), below, low);
    }
    return add(add(e[0], e[1]), add(e[2], e[3]));
}

// The same of a row's last tile, which ends early.
inline V16 last_mass_lanes(const float* tile, int64_t count, float best) {
    float whole[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) whole[i] = i < count ? tile[i] : -kInf;
    return mass_lanes(whole, best);
}

// masses: scratch, a float for each tile.
inline uint64_t mass_of_tiles(const float* row, const float* block_max, int64_t vocab, float top,
                              float* masses) {
    const int64_t whole = vocab / kBlock;
    int64_t tile = 0;
    for (; tile + 4 <= whole; tile += 4) {
        V16 lanes[4];
        for (int i = 0; i < 4; ++i)
            lanes[i] = mass_lanes(row + (tile + i) * kBlock, block_max[tile + i]);
        reduce_add4(lanes, masses + tile);
    }
    for (; tile < whole; ++tile)
        masses[tile] = reduce_add(mass_lanes(row + tile * kBlock, block_max[tile]));
    if (const int64_t rest = vocab - whole * kBlock; rest > 0)
        masses[tile++] = reduce_add(last_mass_lanes(row + whole * kBlock, rest, block_max[whole]));
    uint64_t total = 0;
    int64_t t = 0;
    for (; t + 16 <= tile; t += 16) {
        const V16 below = sub(load(block_max + t), splat(top));
        const V16 mass = mul(mul(load(masses + t), exp_within(below)), splat(kMassOne));
        store(zero_where_less(mass, below, splat(kNoTileMass)), masses + t);
        for (int64_t i = t; i < t + 16; ++i)
            total += static_cast<uint64_t>(static_cast<int64_t>(masses[i]));
    }
    for (; t < tile; ++t) total += mass_in_row(masses[t], block_max[t] - top);
    return total;
}

}  // namespace specrt::SPECRT_ISA
