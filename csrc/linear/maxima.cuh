// Keys of a tile's logits (core/tile_maxima.h), for whoever would read all of these next.
#pragma once
#include "linear/epilogue.cuh"

namespace specrt::product {

// By what a row's tokens are scored.
struct Scoring {
    bool draws;
    float temperature;
    uint64_t seed, position;
};

__device__ __forceinline__ Scoring scoring_of(const LinearParams& p, int64_t row) {
    const TileMaxima& m = p.maxima;
    const int64_t seq = row / m.nodes;
    const SamplingRow& s = m.sampling[seq];
    return {draws_unfiltered(s, p.num_outputs), s.temperature, s.seed,
            static_cast<uint64_t>(m.history_len[seq]) + static_cast<uint64_t>(m.depth[row])};
}

// The best of four tokens 16 apart, `first` and those behind it, which share a counter of noise.
// `sums` begins at `first`.
__device__ __forceinline__ uint64_t best_of_four(const LinearParams& p, const Scoring& scoring,
                                                 const float* sums, int first) {
    PhiloxWords bits{};
    if (scoring.draws)
        bits = bits_around(scoring.seed, scoring.position, Purpose::kTarget,
                           static_cast<uint32_t>(first));
    uint64_t best = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int token = first + 16 * r;
        if (token >= p.num_outputs) continue;
        float score = with_bias(p, sums[16 * r], token);
        if (scoring.draws) score /= scoring.temperature;
        const bool is_bad = !(score < __builtin_huge_valf());
        if (scoring.draws) score += gumbel_from(bits.word[r]);
        const uint64_t key = is_bad ? kBadKey : key_of(score, token);
        best = key > best ? key : best;
    }
    return best;
}

// Sixteen threads share the 64 tokens of a key. All threads of the block must call.
template <typename G>
__device__ __forceinline__ void write_maxima(const LinearParams& p, const Target& t,
                                             const float* staged) {
    constexpr int kKeys = G::kTile / kTileTokens, kLanes = kTileTokens / 4;  // of a row, of a key
    constexpr int kAtOnce = G::kThreads / kLanes;
    static_assert(G::kColumns * kKeys % kAtOnce == 0, "a warp's threads stay together");
    const int lane = threadIdx.x % kLanes;
    for (int i = threadIdx.x / kLanes; i < G::kColumns * kKeys; i += kAtOnce) {
        const int column = i / kKeys, at = i % kKeys * kTileTokens;
        const int row = t.first_row + column, first = t.first_weight + at;
        const bool is_there = row < p.num_rows && first < p.num_outputs;
        uint64_t best = 0;
        if (is_there) {
            const Scoring scoring = scoring_of(p, p.maxima.first_row + row);
            const float* sums = staged + column * kStaged<G> + at + lane;
            best = best_of_four(p, scoring, sums, first + lane);
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
            const uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
            best = other > best ? other : best;
        }
        if (lane != 0 || !is_there) continue;
        const int64_t line = (p.maxima.first_row + row) * num_token_tiles(p.num_outputs);
        p.maxima.keys[line + first / kTileTokens] = best;
    }
}

}  // namespace specrt::product
