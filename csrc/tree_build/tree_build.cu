// Children of frontier nodes, and the next frontier. A block of threads has a row: from the best
// keys of its tiles of 64 tokens (core/tile_maxima.h) it knows which tiles can hold one of the K
// best tokens, at most K, and reads those alone. Keys and masses are the product's that made the
// logits; where it left none, another launch before reads all logits for them.
//
// 1. scan_tiles (draft_row.cuh), where the product left nothing: keys and masses of all tiles.
// 2. expand_rows: what a row that samples keeps (filter.cuh), its best K, their scores. Whoever
//    comes last of a sequence picks the frontier (frontier.cuh).
//
// What is ordered is ordered as keys (core/score_key.h), what is added is integers: no bit depends
// on who comes when.
#include "core/ptx.cuh"
#include "tree_build/filter.cuh"
#include "tree_build/frontier.cuh"

namespace specrt {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kMostTiles = 2048;     // listed at a time
constexpr float kMinGumbel = -3.2f;  // the least is -ln(33 ln 2) = -3.13

__global__ void __launch_bounds__(kThreads) scan_tiles(const TreeExpandParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const int slices = static_cast<int>(expand_slices(p.rows));
    const int slice = static_cast<int>(blockIdx.x) % slices;
    const int number = static_cast<int>(blockIdx.x) / slices;
    if (is_closed(p, number / p.width)) return;
    const DraftRow row(p, number);
    const int first_tile = slice * 4 * kTilesAtOnce + static_cast<int>(threadIdx.x) / kTileLanes;
    float x[4][4];  // all on their way at once
#pragma unroll
    for (int i = 0; i < 4; ++i) row.load_four(first_token(first_tile + i * kTilesAtOnce), x[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int tile = first_tile + i * kTilesAtOnce;
        uint64_t keys[4];
        keys_of_four(row.scoring, p.token_map, x[i], first_token(tile), row.rows, keys);
        const uint64_t best = best_of_tile(keys);
        const float mass = mass_of_tile(x[i], first_token(tile), row.rows, best);
        if (threadIdx.x % kTileLanes != 0 || tile >= row.tiles) continue;
        row.keys[tile] = best;
        row.masses[tile] = mass;
    }
}

struct RankShared {
    BestKeys best;
    unsigned long long mass;
    int tiles[kMostTiles];
    int num_tiles, flag;
    float increments[kMaxTopK];
    unsigned words[kThreads / 32];
    bool is_taken[kMaxTopK];
};

// Offers the tokens of listed tiles. keys_of(logits, first, bound, keys) gives four tokens' keys.
// All threads of the block must call.
template <typename KeysOf>
__device__ __forceinline__ void offer_tiles(const DraftRow& row, int top_k, int count,
                                            uint64_t bound, const KeysOf& keys_of,
                                            RankShared* shared) {
    for (int listed = 0; listed < count; listed += kTilesAtOnce) {
        const int at = listed + static_cast<int>(threadIdx.x) / kTileLanes;
        const uint32_t first = at < count ? first_token(shared->tiles[at]) : row.rows;
        float x[4];
        row.load_four(first, x);
        make_room(&shared->best, top_k, &bound);
        uint64_t keys[4] = {};
        keys_of(x, first, bound, keys);
#pragma unroll
        for (int r = 0; r < 4; ++r) offer_key(&shared->best, keys[r], bound);
    }
}

// The K best tiles above `bound`, sorted. All threads of the block must call.
__device__ __forceinline__ void find_tiles(const TreeExpandParams& p, const DraftRow& row,
                                           uint64_t bound, RankShared* shared) {
    find_best(&shared->best, row.tiles, p.top_k, [&](int64_t i) { return row.keys[i]; }, bound);
}

// The best of a row whose tiles' keys are its tokens': those of the K best tiles alone can be among
// them. False if the row cannot be ranked. All threads of the block must call.
__device__ __forceinline__ bool rank_row(const TreeExpandParams& p, const DraftRow& row,
                                         RankShared* shared) {
    find_tiles(p, row, kLeastKey, shared);
    const int count = shared->best.count, j = static_cast<int>(threadIdx.x);
    if (count == 0 || is_bad(shared->best.keys[0])) return false;
    const uint64_t bound = count == p.top_k ? shared->best.keys[count - 1] - 1 : kLeastKey;
    if (j < count) {
        const auto tile = static_cast<uint32_t>(index_of(shared->best.keys[j])) / kTileTokens;
        shared->tiles[j] = min(static_cast<int>(tile), row.tiles - 1);
    }
    clear_keys(&shared->best);
    const auto keys_of = [&](const float (&x)[4], uint32_t first, uint64_t, uint64_t (&keys)[4]) {
        keys_of_four(row.scoring, p.token_map, x, first, row.rows, keys);
    };
    offer_tiles(row, p.top_k, count, bound, keys_of, shared);
    return true;
}

// Lists those of kMostTiles tiles, from `base` on, that may hold what is kept and ranked: of at
// least `cut`, and with the most noise of `least`. All threads of the block must call.
__device__ __forceinline__ int list_tiles(const DraftRow& row, int base, float cut, float least,
                                          RankShared* shared) {
    __syncthreads();  // the list may still be read from before
    if (threadIdx.x == 0) shared->num_tiles = 0;
    __syncthreads();
    const int end = min(base + kMostTiles, row.tiles);
    for (int i = base + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
        const float best = score_of(row.keys[i]);
        if (best > -INFINITY && best >= cut && !(best + kMaxGumbel < least))
            shared->tiles[atomicAdd(&shared->num_tiles, 1)] = i;
    }
    __syncthreads();
    return shared->num_tiles;
}

// The best of a row by noise that its tiles' keys do not have, of the tokens that are kept. All
// threads of the block must call.
__device__ __forceinline__ void rank_kept(const TreeExpandParams& p, const DraftRow& row,
                                          const RowFilter& filter, RankShared* shared) {
    // Tokens equal to the cut are not all kept, so they are no bound for the others.
    const uint64_t at_cut = uint64_t{ordered_bits(filter.cut)} << 32 | 0xffffffffu;
    find_tiles(p, row, at_cut > kLeastKey ? at_cut : kLeastKey, shared);
    const bool is_bounded = shared->best.count == p.top_k;
    const float least =
        is_bounded ? score_of(shared->best.keys[p.top_k - 1]) + kMinGumbel : -INFINITY;
    clear_keys(&shared->best);
    const auto keys_of = [&](const float (&x)[4], uint32_t first, uint64_t bound,
                             uint64_t (&keys)[4]) {
        const float most = bound > 0 ? score_of(bound) : least;
        bool is_wanted[4], is_any = false;
        float value[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            value[r] = row.processed(x[r]);
            is_wanted[r] = first + 16 * r < row.rows && value[r] > -INFINITY &&
                           !(value[r] + kMaxGumbel < most) &&
                           filter.keeps(value[r], first + 16 * r);
            is_any = is_any || is_wanted[r];
        }
        if (!is_any) return;
        const PhiloxWords words = noise_of_four(row.scoring, p.token_map, first, row.rows);
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (is_wanted[r])
                keys[r] = key_of(value[r] + gumbel_from(words.word[r]),
                                 static_cast<int32_t>(first + 16 * r));
    };
    const uint64_t bound = is_bounded ? uint64_t{ordered_bits(least)} << 32 : 0;
    for (int base = 0; base < row.tiles; base += kMostTiles) {
        const int count = list_tiles(row, base, filter.cut, least, shared);
        offer_tiles(row, p.top_k, count, bound, keys_of, shared);
    }
}

enum class Outcome { kRanked, kBroken, kNotLast };

// Of a row that is filtered: of the blocks that weigh it the last goes on with it. All threads of
// the block must call.
__device__ __forceinline__ Outcome find_filter(const TreeExpandParams& p, const DraftRow& row,
                                               int number, int slice, RowFilter* filter) {
    auto* shared = reinterpret_cast<FilterShared*>(dynamic_shared());
    const FilterRules rules(*row.sampling, p.rows);
    const uint64_t best = best_of_row(row, shared->listed);
    if (is_bad(best)) return slice == 0 ? Outcome::kBroken : Outcome::kNotLast;
    const float top = score_of(best);
    if (rules.has_top_k || rules.has_top_p) {
        unsigned long long* weights = filter_weights(p, number);
        weigh_slice(rules, row, weights, slice, top, &shared->select);
        const auto slices = static_cast<unsigned>(expand_slices(p.rows));
        if (!is_last_block(filter_ticket(p, number), slices, &shared->flag))
            return Outcome::kNotLast;
        *filter = filter_row(rules, row, weights, top, shared);
    } else {
        *filter = with_min_p(*filter, top, rules.min_p);
    }
    return Outcome::kRanked;
}

// All threads of the block must call.
__device__ __forceinline__ Outcome rank(const TreeExpandParams& p, const DraftRow& row, int number,
                                        int slice, RankShared* shared) {
    if (!row.is_filtered()) return rank_row(p, row, shared) ? Outcome::kRanked : Outcome::kBroken;
    RowFilter filter{-INFINITY, INT32_MAX};
    const Outcome found = find_filter(p, row, number, slice, &filter);
    if (found == Outcome::kRanked) rank_kept(p, row, filter, shared);
    return found;
}

__device__ __forceinline__ float not_above_zero(float x) {
    return x < 0.0f ? x : 0.0f;
}

// The row's mass relative to its best logit: this thread's part.
__device__ __forceinline__ uint64_t part_of_mass(const DraftRow& row, float top) {
    uint64_t mass = 0;
    for (int i = threadIdx.x; i < row.tiles; i += kThreads)
        mass += mass_in_row(row.masses[i], score_of(row.keys[i]) - top);
    return mass;
}

// What each ranked child's score is below its parent's. All threads of the block must call.
__device__ __forceinline__ void find_increments(const TreeExpandParams& p, const DraftRow& row,
                                                RankShared* shared) {
    const int j = static_cast<int>(threadIdx.x), count = shared->best.count;
    const float top = score_of(shared->best.keys[0]);
    float x = score_of(shared->best.keys[j < count ? j : 0]) - top;
    if (row.sampling) x /= p.noise_scale_temperature;
    uint64_t mass = 0;
    if (!row.sampling)
        mass = part_of_mass(row, top);
    else if (j < count)
        mass = mass_of(x);
    const float log_sum = log_of_mass(block_mass(mass, &shared->mass));
    if (j < count) shared->increments[j] = not_above_zero(x - log_sum);
}

// Where fewer than K tokens are ranked: the first others. All threads of the block must call.
__device__ __forceinline__ void fill_children(const TreeExpandParams& p, float increment,
                                              RankShared* shared) {
    const int j = static_cast<int>(threadIdx.x), count = shared->best.count;
    if (j < p.top_k) shared->is_taken[j] = false;
    __syncthreads();
    if (j < count) {
        const int32_t index = index_of(shared->best.keys[j]);
        if (0 <= index && index < p.top_k) shared->is_taken[index] = true;
    }
    __syncthreads();
    const bool is_free = j < p.top_k && !shared->is_taken[j];
    const int place = count + block_votes(is_free, shared->words).before;
    if (is_free && place < p.top_k) {
        shared->best.keys[place] = key_of(-INFINITY, j);
        shared->increments[place] = increment;
    }
    __syncthreads();
}

__device__ __forceinline__ void write_children(const TreeExpandParams& p, int row,
                                               const RankShared& shared) {
    const int j = static_cast<int>(threadIdx.x);
    if (j >= p.top_k) return;
    const auto found = static_cast<uint32_t>(index_of(shared.best.keys[j]));
    const int32_t i = static_cast<int32_t>(min(found, static_cast<uint32_t>(p.rows - 1)));
    write_child(p, row, j, i, p.scores[row] + shared.increments[j]);
}

// Three blocks an SM are enough; for more, ptxas would spill registers.
__global__ void __launch_bounds__(kThreads, 3) expand_rows(const TreeExpandParams p, int slices) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<RankShared*>(dynamic_shared());
    const int slice = static_cast<int>(blockIdx.x) % slices;
    const int number = static_cast<int>(blockIdx.x) / slices, seq = number / p.width;
    if (is_closed(p, seq)) {
        if (slice == 0) close_row(p, number);
        return;
    }
    const DraftRow row(p, number);
    const bool is_shared = row.sampling && is_weighed(*row.sampling, p.rows);
    if (slice > 0 && !is_shared) return;
    const Outcome outcome = rank(p, row, number, slice, shared);
    if (outcome == Outcome::kNotLast) return;
    const bool is_broken = outcome == Outcome::kBroken;
    if (is_broken) clear_keys(&shared->best);
    __syncthreads();
    keep_best(&shared->best, p.top_k);
    if (shared->best.count > 0) find_increments(p, row, shared);
    if (shared->best.count < p.top_k)
        fill_children(p, is_broken ? from_ordered_bits(0) : -INFINITY, shared);
    write_children(p, number, *shared);
    if (is_last_block(sequence_ticket(p, seq), p.width, &shared->flag))
        pick_frontier(p, seq, &shared->best);
}

}  // namespace

void tree_expand_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeExpandParams*>(params);
    if (p.batch == 0) return;
    const int64_t rows = int64_t{p.batch} * p.width, slices = expand_slices(p.rows);
    const dim3 block(kThreads);
    if (!p.keys) {
        const dim3 grid(static_cast<unsigned>(rows * slices));
        SPECRT_LAUNCH(scan_tiles, (LaunchShape{grid, block, 0, kOverlaps}), stream, p);
    }
    const int64_t sharing = p.sampling ? slices : 1;  // blocks of a row that is weighed
    const size_t bytes = p.sampling && sizeof(FilterShared) > sizeof(RankShared)
                             ? sizeof(FilterShared)
                             : sizeof(RankShared);
    const LaunchShape shape{dim3(static_cast<unsigned>(rows * sharing)), block, bytes, kOverlaps};
    SPECRT_LAUNCH(expand_rows, shape, stream, p, static_cast<int>(sharing));
}

}  // namespace specrt
