// Keys, and then values, of one leaf in float32, and products of blocks of rows with them: where
// many rows see a leaf, each key is looked up and converted once for all.
//
// The bits are those of one row with one key. A score's sixteen lanes are sixteen sums here, each a
// vector of as many keys, and the fixed tree adds vectors; values are accumulated key by key.
#pragma once
#include "core/simd.h"

namespace specrt::SPECRT_ISA {

constexpr int kLeaf = 64, kMaxDim = 256;
#if defined(__AVX512F__)
// Six sums of the tree are open at most, so scores take 24 registers of 32, as values do.
constexpr int kScoreRows = 2, kScoreVectors = 2, kValueRows = 6, kValueVectors = 4;
#else
constexpr int kScoreRows = 2, kScoreVectors = 1, kValueRows = 2, kValueVectors = 2;
#endif
constexpr int kScoreKeys = 16 * kScoreVectors;  // of a block

struct LeafTile {
    int head_dim;
    // Keys in blocks [d, kScoreKeys], or values [kLeaf, d].
    alignas(64) float data[kLeaf * kMaxDim];
};

// The keys at `offsets`, from `begin` on; what is left of their first and last block becomes zero.
template <typename T>
void read_keys(LeafTile& tile, const T* keys, const int64_t* offsets, int begin, int count) {
    const int d = tile.head_dim, end = (count + kScoreKeys - 1) / kScoreKeys * kScoreKeys;
    const unsigned num_keys = static_cast<unsigned>(count - begin);
    for (int j = begin / kScoreKeys * kScoreKeys; j < end; j += 16) {
        float* block = tile.data + j / kScoreKeys * kScoreKeys * d + j % kScoreKeys;
        for (int i = 0; i < d; i += 16) {
            V16 square[16];
            for (int r = 0; r < 16; ++r) {
                const bool is_key = static_cast<unsigned>(j + r - begin) < num_keys;
                square[r] = is_key ? load(keys + offsets[j + r] + i) : zero();
            }
            transpose(square);
            for (int r = 0; r < 16; ++r) store(square[r], block + (i + r) * kScoreKeys);
        }
    }
}

template <typename T>
void read_values(LeafTile& tile, const T* values, const int64_t* offsets, int begin, int count) {
    const int d = tile.head_dim;
    for (int j = begin; j < count; ++j)
        for (int i = 0; i < d; i += 16) store(load(values + offsets[j] + i), tile.data + j * d + i);
}

// Of R rows with a block of keys.
template <int R>
struct Scores {
    V16 of[R][kScoreVectors];
};

template <int R>
Scores<R> sum_of(const Scores<R>& a, const Scores<R>& b) {
    Scores<R> sums;
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kScoreVectors; ++c) sums.of[r][c] = add(a.of[r][c], b.of[r][c]);
    return sums;
}

// Lanes `lane` and `lane` + 8 of the scores, summed: two at a time keep the multipliers busy.
template <int R>
inline __attribute__((always_inline)) Scores<R> sum_of_two(const float* const (&q)[R],
                                                           const float* keys, int head_dim,
                                                           int lane) {
    Scores<R> low, high;
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < kScoreVectors; ++c) low.of[r][c] = high.of[r][c] = zero();
    const auto step = [&](Scores<R>& sums, int i) {
        V16 k[kScoreVectors];
        for (int c = 0; c < kScoreVectors; ++c) k[c] = load(keys + i * kScoreKeys + 16 * c);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kScoreVectors; ++c)
                sums.of[r][c] = fma(splat(q[r][i]), k[c], sums.of[r][c]);
    };
    for (int i = lane; i < head_dim; i += 16) step(low, i), step(high, i + 8);
    return sum_of(low, high);
}

// What the fixed tree makes of lanes kLane, kLane + kWidth, .. of the scores.
template <int R, int kLane, int kWidth>
inline __attribute__((always_inline)) Scores<R> sum_of_lanes(const float* const (&q)[R],
                                                             const float* keys, int head_dim) {
    if constexpr (kWidth == 8) {
        return sum_of_two<R>(q, keys, head_dim, kLane);
    } else {
        const auto these = sum_of_lanes<R, kLane, 2 * kWidth>(q, keys, head_dim);
        return sum_of(these, sum_of_lanes<R, kLane + kWidth, 2 * kWidth>(q, keys, head_dim));
    }
}

// Scores of R rows, one for each key of a tile and of what fills its first and last block.
template <int R>
void score_tile(const LeafTile& tile, const float* const (&q)[R], int begin, int count, float scale,
                float* const (&score)[R]) {
    for (int j = begin / kScoreKeys * kScoreKeys; j < count; j += kScoreKeys) {
        const auto sums = sum_of_lanes<R, 0, 1>(q, tile.data + j * tile.head_dim, tile.head_dim);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < kScoreVectors; ++c)
                store(mul(sums.of[r][c], splat(scale)), score[r] + j + 16 * c);
    }
}

// out (+)= weight * value over keys begin..end in order, for R rows and C vectors of columns; what
// begins with key 0 begins with zero, whatever was there.
template <int R, int C>
void value_columns(const LeafTile& tile, const float* const (&weight)[R], int begin, int end,
                   int column, float* const (&out)[R]) {
    V16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            acc[r][c] = begin == 0 ? zero() : load(out[r] + column + 16 * c);
    const float* value = tile.data + begin * tile.head_dim + column;
    for (int j = begin; j < end; ++j, value += tile.head_dim) {
        V16 v[C];
        for (int c = 0; c < C; ++c) v[c] = load(value + 16 * c);
        for (int r = 0; r < R; ++r) {
            const V16 w = splat(weight[r][j]);
            for (int c = 0; c < C; ++c) acc[r][c] = fma(w, v[c], acc[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(acc[r][c], out[r] + column + 16 * c);
}

template <int R>
void value_tile(const LeafTile& tile, const float* const (&weight)[R], int begin, int end,
                float* const (&out)[R]) {
    int at = 0;
    for (; at + 16 * kValueVectors <= tile.head_dim; at += 16 * kValueVectors)
        value_columns<R, kValueVectors>(tile, weight, begin, end, at, out);
    for (; at < tile.head_dim; at += 16) value_columns<R, 1>(tile, weight, begin, end, at, out);
}

}  // namespace specrt::SPECRT_ISA
