// A tile of 64 tokens (core/tile_maxima.h) as sixteen lanes share it: each has four tokens 16
// apart, as many as one counter has noise for.
#pragma once
#include "core/reduce.cuh"
#include "core/tile_maxima.h"

namespace specrt {

constexpr int kTileLanes = kTileTokens / 4;

// Noise of token `first` and those behind it. token_map: their names, [vocab], or nullptr.
__device__ __forceinline__ PhiloxWords noise_of_four(const Scoring& scoring,
                                                     const int32_t* token_map, uint32_t first,
                                                     uint32_t vocab) {
    if (!token_map) return bits_around(scoring.seed, scoring.position, Purpose::kTarget, first);
    PhiloxWords words{};
#pragma unroll
    for (int r = 0; r < 4; ++r)
        if (first + 16 * r < vocab)
            words.word[r] = philox(scoring.seed, scoring.position, Purpose::kTarget,
                                   static_cast<uint32_t>(token_map[first + 16 * r]));
    return words;
}

// Keys of token `first` and those behind it, by their logits; 0 past the end.
__device__ __forceinline__ void keys_of_four(const Scoring& scoring, const int32_t* token_map,
                                             const float (&logits)[4], uint32_t first,
                                             uint32_t vocab, uint64_t (&keys)[4]) {
    PhiloxWords bits{};
    if (scoring.draws) bits = noise_of_four(scoring, token_map, first, vocab);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const uint32_t token = first + 16 * r;
        float score = logits[r];
        if (scoring.temperature != 1.0f) score /= scoring.temperature;
        const bool is_bad = !(score < __builtin_huge_valf());
        if (scoring.draws) score += gumbel_from(bits.word[r]);
        keys[r] = is_bad ? kBadKey : key_of(score, static_cast<int32_t>(token));
        if (token >= vocab) keys[r] = 0;
    }
}

// The largest of a tile's keys, to its lanes. All lanes of the warp must call, as below.
__device__ __forceinline__ uint64_t best_of_tile(const uint64_t (&keys)[4]) {
    uint64_t best = keys[0];
#pragma unroll
    for (int r = 1; r < 4; ++r) best = keys[r] > best ? keys[r] : best;
#pragma unroll
    for (int step = kTileLanes / 2; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
        best = other > best ? other : best;
    }
    return best;
}

// A tile's mass relative to its best logit, of which `best` is the key.
__device__ __forceinline__ float mass_of_tile(const float (&logits)[4], uint32_t first,
                                              uint32_t vocab, uint64_t best) {
    const float top = score_of(best);
    float e[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) e[r] = first + 16 * r < vocab ? exp_of(logits[r] - top) : 0.0f;
    float mass = (e[0] + e[1]) + (e[2] + e[3]);
#pragma unroll
    for (int step = kTileLanes / 2; step > 0; step /= 2)
        mass += __shfl_xor_sync(kFullWarp, mass, step);
    return mass;
}

}  // namespace specrt
