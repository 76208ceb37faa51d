// Which tokens of a row that samples are kept, before their noise is looked at.
//
// Blocks share a row that is weighed, in slices, and add up its tokens' weights (1 for top_k, else
// masses) by how far they lie below the best: 256 distances, an eighth of a logit each. Whoever
// comes last sees at which of them the cut is, and lists the tokens down to there, of tiles whose
// best reaches it. They are few, mostly, and what is kept is found among them; where the list has
// no room, as in flat rows, the whole row is gone through instead.
#pragma once
#include "core/row_filter.cuh"
#include "tree_build/draft_row.cuh"

namespace specrt {

constexpr int kMostListed = 4096;
static_assert(kRowThreads == kDistances && kDistances == 256);  // a thread a distance

struct FilterShared {
    uint64_t listed[kMostListed];
    SelectShared select;
    int num_listed, flag;
};

// By distance from the best, which has the largest digit. (As subtraction is monotone, of two
// tokens with different digits the larger has the larger.) What lies above the best, as keys of
// other logits would have it, counts as the best.
__device__ __forceinline__ uint32_t digit_of(float x, float top) {
    const float distance = (top - x) * 8.0f;
    if (!(distance < kDistances - 1)) return 0;
    return kDistances - 1 - (distance > 0.0f ? static_cast<uint32_t>(distance) : 0);
}

// Adds the slice's weights to the row's. All threads of the block must call.
__device__ __forceinline__ void weigh_slice(const FilterRules& rules, const DraftRow& row,
                                            unsigned long long* weights, int slice, float top,
                                            SelectShared* shared) {
    shared->weights[threadIdx.x] = 0;
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
        const int tile =
            (slice * 4 + round) * kTilesAtOnce + static_cast<int>(threadIdx.x) / kTileLanes;
        const uint32_t first = first_token(tile);
        float x[4];
        row.load_four(first, x);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const bool is_there = first + 16 * r < row.rows;
            const float value = row.processed(x[r]);
            const uint64_t weight = rules.has_top_k ? 1 : mass_of(value - top);
            add_weight(shared->weights, is_there && weight > 0, digit_of(value, top), weight);
        }
    }
    __syncthreads();
    const unsigned long long weight = shared->weights[threadIdx.x];
    if (weight > 0) atomicAdd(weights + threadIdx.x, weight);
}

// Lists the tokens of at least `digit`, as far as there is room. All threads of the block must
// call.
__device__ __forceinline__ void list_tokens(const DraftRow& row, float top, uint32_t digit,
                                            FilterShared* shared) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) shared->num_listed = 0;
    __syncthreads();
    for (int base = threadIdx.x - lane; base < row.tiles; base += kRowThreads) {
        const bool is_there = base + lane < row.tiles;
        const float best = score_of(is_there ? row.keys[base + lane] : 0);
        unsigned todo = __ballot_sync(kFullWarp, is_there && digit_of(best, top) >= digit);
        for (; todo != 0; todo &= todo - 1) {
            const uint32_t tile = base + __ffs(static_cast<int>(todo)) - 1;
            for (uint32_t i = tile * kTileTokens + lane; i < (tile + 1) * kTileTokens; i += 32) {
                const float x = i < row.rows ? row.processed(row.logits[i]) : -INFINITY;
                const bool is_listed = i < row.rows && digit_of(x, top) >= digit;
                const int at = is_listed ? atomicAdd(&shared->num_listed, 1) : kMostListed;
                if (at < kMostListed) shared->listed[at] = key_of(x, static_cast<int32_t>(i));
            }
        }
    }
    __syncthreads();
}

// After all slices have been weighed; the weights are 0 again. All threads of the block must call.
__device__ __forceinline__ RowFilter filter_row(const FilterRules& rules, const DraftRow& row,
                                                unsigned long long* weights, float top,
                                                FilterShared* shared) {
    const uint64_t weight = weights[threadIdx.x];
    weights[threadIdx.x] = 0;
    shared->select.weights[threadIdx.x] = weight;
    const uint64_t total = block_mass(weight, &shared->select.sum);
    const uint64_t target = rules.has_top_k ? rules.top_k : nucleus_mass(rules.top_p, total);
    if (threadIdx.x < 32) find_digit(&shared->select, target);
    __syncthreads();
    list_tokens(row, top, shared->select.digit, shared);
    const int listed = shared->num_listed;
    const bool is_listed = listed <= kMostListed;
    const uint32_t count = is_listed ? listed : row.rows, whole_warps = (count + 31) / 32 * 32;
    const auto tokens = [&](auto see) {
        for (uint32_t i = threadIdx.x; i < whole_warps; i += kRowThreads) {
            uint64_t key = 0;  // past the end: lanes stay together
            if (i < count)
                key = is_listed ? shared->listed[i]
                                : key_of(row.processed(row.logits[i]), static_cast<int32_t>(i));
            see(key);
        }
    };
    return make_filter(rules, tokens, top, total, &shared->select);
}

}  // namespace specrt
