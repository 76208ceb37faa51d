// What a level leaves: its children in the pool, and the next frontier.
#pragma once
#include "core/best_keys.cuh"
#include "core/mass.h"
#include "tree_build/level.h"

namespace specrt {

__device__ __forceinline__ int32_t token_of(const TreeExpandParams& p, int32_t i) {
    return p.token_map ? p.token_map[i] : i;
}

// Child j of a row, token i of the draft head.
__device__ __forceinline__ void write_child(const TreeExpandParams& p, int row, int j, int32_t i,
                                            float score) {
    const int64_t group = level_base(p) + int64_t{row % p.width} * p.top_k;
    const int64_t at = int64_t{row / p.width} * p.pool_size + group + j;
    p.pool_tokens[at] = token_of(p, i);
    p.pool_parents[at] = p.candidates[row];
    p.pool_scores[at] = score == score ? score : from_ordered_bits(0);  // one NaN, as on the CPU
}

// Node j of the frontier, the level's child i.
__device__ __forceinline__ void write_frontier(const TreeExpandParams& p, int64_t seq, int j, int i,
                                               int32_t token, float score) {
    const int64_t out = seq * p.top_k + j, parent = seq * p.width + i / p.top_k;
    p.frontier_tokens[out] = token;
    p.frontier_scores[out] = score;
    p.frontier_candidates[out] = static_cast<int32_t>(level_base(p) + i);
    p.frontier_source[out] = static_cast<int32_t>(parent);
    const int64_t node = p.level * int64_t{p.top_k} + j;
    for (int64_t word = 0; word < p.words; ++word) {
        auto bits = static_cast<uint64_t>(p.ancestors[parent * p.words + word]);
        if (node / 64 == word) bits |= uint64_t{1} << (node % 64);
        p.frontier_ancestors[out * p.words + word] = static_cast<int64_t>(bits);
    }
}

// What a row of a closed sequence leaves.
__device__ __forceinline__ void close_row(const TreeExpandParams& p, int row) {
    const int j = static_cast<int>(threadIdx.x), seq = row / p.width;
    if (j >= p.top_k) return;
    write_child(p, row, j, j, -INFINITY);
    if (row % p.width != 0) return;
    write_frontier(p, seq, j, j, token_of(p, j), -INFINITY);
    if (j == 0 && p.level_score) p.level_score[seq] = -INFINITY;
}

constexpr uint32_t kScannedNaN = ~0u;

// NaN above all.
__device__ __forceinline__ uint32_t scanned_bits(float x) {
    return x != x ? kScannedNaN : ordered_bits(x);
}

// ln of a sum of e^score, to all lanes; NaN if a score is.
__device__ __forceinline__ float warp_log_sum(const float* scores, int count) {
    const int lane = threadIdx.x % 32;
    uint32_t most = 0;
    for (int i = lane; i < count; i += 32) most = max(most, scanned_bits(scores[i]));
    most = __reduce_max_sync(kFullWarp, most);
    if (most == kScannedNaN) return from_ordered_bits(0);
    if (most <= kOrderedMinusInf) return -INFINITY;
    const float top = from_ordered_bits(most);
    uint64_t mass = 0;
    for (int i = lane; i < count; i += 32) mass += mass_of(scores[i] - top);
    for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(kFullWarp, mass, step);
    return top + log_of_mass(mass);
}

// Of the frontier that this block has written. All threads of the block must call.
__device__ __forceinline__ void score_level(const TreeExpandParams& p, int64_t seq) {
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const float below = warp_log_sum(p.frontier_scores + seq * p.top_k, p.top_k);
    const float above = warp_log_sum(p.scores + seq * p.width, p.width);
    if (threadIdx.x == 0) p.level_score[seq] = score_of_level(below, above);
}

// The best K of the level's children. All threads of the block must call.
__device__ __forceinline__ void pick_frontier(const TreeExpandParams& p, int64_t seq,
                                              BestKeys* best) {
    const int64_t children = seq * p.pool_size + level_base(p);
    const float* scores = p.pool_scores + children;
    find_best(best, int64_t{p.width} * p.top_k, p.top_k,
              [&](int64_t i) { return key_of(scores[i], static_cast<int32_t>(i)); });
    const int j = static_cast<int>(threadIdx.x);
    if (j < p.top_k) {
        const int32_t i = index_of(best->keys[j]);
        write_frontier(p, seq, j, i, p.pool_tokens[children + i], scores[i]);
    }
    if (p.level_score) score_level(p, seq);
}

}  // namespace specrt
