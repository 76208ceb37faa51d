// Keys of a tile's logits (core/tile_maxima.h), for whoever would read all of these next.
#pragma once
#include "core/tile_keys.cuh"
#include "linear/epilogue.cuh"

namespace specrt::product {

__device__ __forceinline__ Scoring scoring_of(const LinearParams& p, int64_t row) {
    const TileMaxima& m = p.maxima;
    if (!m.sampling) return draft_scoring(nullptr, p.num_outputs, 0);
    const int64_t seq = row / m.nodes;
    const int64_t depth = m.depth ? m.depth[row] : m.level;
    const auto position = static_cast<uint64_t>(m.history_len[seq] + depth);
    const SamplingRow* s = m.sampling + seq;
    return m.masses ? draft_scoring(s, p.num_outputs, position)
                    : target_scoring(*s, p.num_outputs, position);
}

// Sixteen threads share the 64 tokens of a key. All threads of the block must call.
template <typename G>
__device__ __forceinline__ void write_maxima(const LinearParams& p, const Target& t,
                                             const float* staged) {
    constexpr int kKeys = G::kTile / kTileTokens;  // of a row
    constexpr int kAtOnce = G::kThreads / kTileLanes;
    static_assert(G::kColumns * kKeys % kAtOnce == 0, "a warp's threads stay together");
    const TileMaxima& m = p.maxima;
    const auto vocab = static_cast<uint32_t>(p.num_outputs);
    const int lane = threadIdx.x % kTileLanes;
    for (int i = threadIdx.x / kTileLanes; i < G::kColumns * kKeys; i += kAtOnce) {
        const int column = i / kKeys, at = i % kKeys * kTileTokens;
        const int64_t row = m.first_row + t.first_row + column;
        const int first = t.first_weight + at;
        const bool is_there = t.first_row + column < p.num_rows && first < p.num_outputs;
        const Scoring scoring = scoring_of(p, is_there ? row : m.first_row);
        const float* sums = staged + column * kStaged<G> + at + lane;
        const uint32_t token = is_there ? first + lane : vocab;  // nothing past the end has a key
        float logits[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
            logits[r] = with_bias(p, sums[16 * r], static_cast<int>(token) + 16 * r);
        uint64_t keys[4];
        keys_of_four(scoring, m.token_map, logits, token, vocab, keys);
        const uint64_t best = best_of_tile(keys);
        const int64_t tile = row * num_token_tiles(p.num_outputs) + first / kTileTokens;
        if (lane == 0 && is_there) m.keys[tile] = best;
        if (!m.masses) continue;
        const float mass = mass_of_tile(logits, token, vocab, best);
        if (lane == 0 && is_there) m.masses[tile] = mass;
    }
}

}  // namespace specrt::product
