// A row of the draft head's logits and its tiles (core/tile_maxima.h), as a block of threads finds
// them: in what the product has left, or in the workspace, where scan_tiles leaves the same.
#pragma once
#include "core/tile_keys.cuh"
#include "tree_build/level.h"

namespace specrt {

constexpr int kRowThreads = 256;  // of a block
constexpr int kTilesAtOnce = kRowThreads / kTileLanes;
static_assert(kTileTokens * 4 * kTilesAtOnce == kSliceTokens);  // four rounds of a block

// Tickets and weights lie at the workspace's end, and are 0 between launches.
__device__ __forceinline__ unsigned* sequence_ticket(const TreeExpandParams& p, int64_t seq) {
    return reinterpret_cast<unsigned*>(p.workspace + p.workspace_size) - 1 - seq;
}
__device__ __forceinline__ unsigned* filter_ticket(const TreeExpandParams& p, int64_t row) {
    return sequence_ticket(p, p.batch) - row;
}
// [kDistances] of a row that samples.
__device__ __forceinline__ unsigned long long* filter_weights(const TreeExpandParams& p,
                                                              int64_t row) {
    const int64_t tickets = p.batch * (1 + int64_t{p.top_k});
    const int64_t end = (p.workspace_size - tickets) / 2 - row * kDistances;
    return reinterpret_cast<unsigned long long*>(p.workspace) + end - kDistances;
}

struct DraftRow {
    const float* logits;
    const SamplingRow* sampling;  // nullptr: ranked plainly
    Scoring scoring;
    uint32_t rows;
    int tiles;
    uint64_t* keys;  // [tiles]
    float* masses;   // [tiles]

    __device__ __forceinline__ DraftRow(const TreeExpandParams& p, int64_t row)
        : logits(p.logits + row / p.width * p.logits_stride[0] +
                 row % p.width * p.logits_stride[1]),
          sampling(p.sampling ? p.sampling + row / p.width : nullptr),
          scoring(draft_scoring(
              sampling, p.rows,
              p.position ? static_cast<uint64_t>(p.position[row / p.width] + int64_t{p.level})
                         : 0)),
          rows(static_cast<uint32_t>(p.rows)),
          tiles(static_cast<int>(num_token_tiles(p.rows))) {
        if (sampling && !(sampling->temperature > 0.0f)) sampling = nullptr;
        const int64_t total = int64_t{p.batch} * p.width * tiles;
        keys = p.keys ? p.keys : reinterpret_cast<uint64_t*>(p.workspace);
        masses = p.keys ? p.masses : p.workspace + 2 * total;
        keys += row * tiles;
        masses += row * tiles;
    }

    // Whether a token's key is of its logit alone, and not all are kept.
    __device__ __forceinline__ bool is_filtered() const { return sampling && !scoring.draws; }

    // Token `first` and those behind it; -inf past the end.
    __device__ __forceinline__ void load_four(uint32_t first, float (&x)[4]) const {
#pragma unroll
        for (int r = 0; r < 4; ++r)
            x[r] = first + 16 * r < rows ? logits[first + 16 * r] : -INFINITY;
    }
    // Of what is no -inf past the end. (Infinite temperatures make that NaN.)
    __device__ __forceinline__ float processed(float logit) const {
        return sampling ? logit / scoring.temperature : logit;
    }
};

// The token that a lane begins with.
__device__ __forceinline__ uint32_t first_token(int tile) {
    return static_cast<uint32_t>(tile) * kTileTokens + threadIdx.x % kTileLanes;
}

// Scores of no tokens: above -inf, and below NaN and +inf.
constexpr uint64_t kLeastKey = uint64_t{kOrderedMinusInf} << 32 | 0xffffffffu;
__device__ __forceinline__ bool is_bad(uint64_t best) {
    return best == kBadKey || best <= kLeastKey;
}

// The best key of all; `scratch` has one for each warp. All threads of the block must call.
__device__ __forceinline__ uint64_t best_of_row(const DraftRow& row, uint64_t* scratch) {
    uint64_t best = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < row.tiles; i += kRowThreads)
        best = row.keys[i] > best ? row.keys[i] : best;
    for (int step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    for (int warp = 0; warp < kRowThreads / 32; ++warp)
        best = scratch[warp] > best ? scratch[warp] : best;
    return best;
}

}  // namespace specrt
