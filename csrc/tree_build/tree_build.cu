// Children of frontier nodes, and the next frontier. Masses are relative to a row's maximum, so a
// row of a large vocabulary, which many blocks of threads share, takes two launches; the second
// reads it out of the L2 cache.
//
// 1. scan_slices: the maximum of each block of 64 tokens, and of each slice.
// 2. filter_slices (filter.cu), where sequences sample: which tokens of a row are kept.
// 3. rank_slices: a slice's masses, and its best K. Whoever comes last of a row puts its slices
//    together and writes the children; whoever then comes last of a sequence picks the frontier.
//
// What is ordered is ordered as keys (core/score_key.h), what is added is integers: no bit depends
// on who comes when.
#include "core/best_keys.cuh"
#include "core/ptx.cuh"
#include "core/row_filter.cuh"
#include "tree_build/draft_row.cuh"

namespace specrt {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kPerWarp = kBlocks / kWarps;
constexpr float kMinGumbel = -3.2f;  // the least is -ln(33 ln 2) = -3.13

constexpr uint32_t kScannedNaN = ~0u;

// NaN above all.
__device__ __forceinline__ uint32_t scanned_bits(float x) {
    return x != x ? kScannedNaN : ordered_bits(x);
}

__global__ void __launch_bounds__(kThreads) scan_slices(const TreeExpandParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    SPECRT_SHARED(uint32_t[kWarps], tops);
    const int slices = num_slices(p), slice = static_cast<int>(blockIdx.x % slices);
    const int number = static_cast<int>(blockIdx.x / slices);
    if (is_closed(p, number / p.width)) return;
    const RowScratch scratch = row_scratch(p, number);
    const DraftRow row(p, number);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = (slice * kBlocks + warp * kPerWarp) * kTokens + lane;
    float x[2 * kPerWarp];  // all on their way at once
#pragma unroll
    for (int i = 0; i < 2 * kPerWarp; ++i) x[i] = row.raw(first + 32 * i);
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
        const float low = row.processed(x[2 * i], first + 64 * i);
        const float high = row.processed(x[2 * i + 1], first + 64 * i + 32);
        const uint32_t most = max(scanned_bits(low), scanned_bits(high));
        const uint32_t block_max = __reduce_max_sync(kFullWarp, most);
        if (lane == 0) scratch.block_max[slice * kBlocks + warp * kPerWarp + i] = block_max;
        top = max(top, block_max);
    }
    if (lane == 0) tops[warp] = top;
    if (slice == 0) scratch.weights[threadIdx.x] = 0;  // for the filter
    __syncthreads();
    if (threadIdx.x >= 32) return;
    top = __reduce_max_sync(kFullWarp, lane < kWarps ? tops[lane] : 0u);
    if (lane == 0) scratch.slice_max[slice] = top;
}

struct RankShared {
    BestKeys best;
    unsigned long long mass;
    KnownShared known;
    float increments[kMaxTopK];
    unsigned words[kWarps];
    bool is_taken[kMaxTopK];
    int flag;
};

struct Noise {
    const TreeExpandParams& p;
    uint64_t seed, position;
    RowFilter filter;

    __device__ __forceinline__ Noise(const TreeExpandParams& params, const DraftRow& row,
                                     const RowScratch& scratch, int64_t seq)
        : p(params),
          seed(row.sampling->seed),
          position(static_cast<uint64_t>(params.position[seq] + int64_t{params.level})),
          filter{*scratch.cut, *scratch.cut_id} {}

    __device__ __forceinline__ PhiloxWords bits(uint32_t first) const {
        PhiloxWords words{};
        if (!p.token_map) {
            const uint32_t counter = first / kTokens * 16 + first % 16;
            return philox4x32(
                {{counter, static_cast<uint32_t>(Purpose::kTarget), static_cast<uint32_t>(position),
                  static_cast<uint32_t>(position >> 32)}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (first + 16 * r < static_cast<uint32_t>(p.rows))
                words.word[r] = philox(seed, position, Purpose::kTarget,
                                       static_cast<uint32_t>(p.token_map[first + 16 * r]));
        return words;
    }

    // Keys of four tokens with their noise.
    __device__ __forceinline__ void offer(const float* x, uint32_t first, uint64_t bound,
                                          BestKeys* best) const {
        const float least = bound > 0 ? score_of(bound) : -INFINITY;
        bool is_wanted[4], is_any = false;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            is_wanted[r] = x[r] > -INFINITY && !(x[r] + kMaxGumbel < least) &&
                           filter.keeps(x[r], first + 16 * r);
            is_any = is_any || is_wanted[r];
        }
        if (!is_any) return;
        const PhiloxWords words = bits(first);
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (is_wanted[r])
                offer_key(
                    best,
                    key_of(x[r] + gumbel_from(words.word[r]), static_cast<int32_t>(first + 16 * r)),
                    bound);
    }
};

// Offers the slice's tokens, and gives this thread's part of its mass.
__device__ __forceinline__ uint64_t offer_plain(const TreeExpandParams& p, const DraftRow& row,
                                                int slice, float top, uint64_t bound,
                                                BestKeys* best) {
    float x[16];  // all on their way at once
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = row.raw(first_token(slice, i / 4) + 16 * (i % 4));
    uint64_t mass = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i % 4 == 0) make_room(best, p.top_k, &bound);
        const auto token = static_cast<int32_t>(first_token(slice, i / 4) + 16 * (i % 4));
        if (x[i] > -INFINITY) offer_key(best, key_of(x[i], token), bound);
        mass += mass_of(x[i] - top);
    }
    return mass;
}

__device__ __forceinline__ void offer_noisy(const TreeExpandParams& p, const DraftRow& row,
                                            const Noise& noise, int slice, uint64_t bound,
                                            BestKeys* best) {
    for (int round = 0; round < 4; ++round) {
        const uint32_t first = first_token(slice, round);
        float x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = row.raw(first + 16 * r);
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = row.processed(x[r], first + 16 * r);
        make_room(best, p.top_k, &bound);
        noise.offer(x, first, bound, best);
    }
}

// The slice's best K, and of rows ranked plainly its mass.
__device__ __forceinline__ void rank_slice(const TreeExpandParams& p, const DraftRow& row,
                                           const RowScratch& scratch, int64_t seq, int slice,
                                           float top, RankShared* shared) {
    const float cut = row.sampling ? *scratch.cut : -INFINITY;
    uint32_t known = known_best(scratch, num_slices(p), slice, cut, p.top_k, &shared->known);
    if (known > 0 && row.sampling) known = ordered_bits(from_ordered_bits(known) + kMinGumbel);
    const uint64_t bound = uint64_t{known} << 32;  // below the keys of its equals
    uint64_t mass = 0;
    clear_keys(&shared->best);
    if (row.sampling)
        offer_noisy(p, row, Noise(p, row, scratch, seq), slice, bound, &shared->best);
    else
        mass = offer_plain(p, row, slice, top, bound, &shared->best);
    mass = block_mass(mass, &shared->mass);
    keep_best(&shared->best, p.top_k);
    const int j = static_cast<int>(threadIdx.x);
    if (j < p.top_k)
        scratch.keys[slice * p.top_k + j] = j < shared->best.count ? shared->best.keys[j] : 0;
    if (j == 0) scratch.masses[slice] = mass;
}

__device__ __forceinline__ float not_above_zero(float x) {
    return x < 0.0f ? x : 0.0f;
}

// What each ranked child's score is below its parent's. All threads of the block must call.
__device__ __forceinline__ void find_increments(const TreeExpandParams& p, const DraftRow& row,
                                                const RowScratch& scratch, float top,
                                                RankShared* shared) {
    const int j = static_cast<int>(threadIdx.x), count = shared->best.count;
    const float score = score_of(shared->best.keys[j < count ? j : 0]);
    uint64_t mass = 0;
    float x = score - top;
    if (row.sampling) {  // relative to the best, so that no temperature overflows it
        x = (score - score_of(shared->best.keys[0])) / p.noise_scale_temperature;
        if (j < count) mass = mass_of(x);
    } else {
        for (int slice = j; slice < num_slices(p); slice += kThreads) mass += scratch.masses[slice];
    }
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

__device__ __forceinline__ void write_children(const TreeExpandParams& p, int row,
                                               const RankShared& shared) {
    const int j = static_cast<int>(threadIdx.x);
    if (j >= p.top_k) return;
    const auto found = static_cast<uint32_t>(index_of(shared.best.keys[j]));
    const int32_t i = static_cast<int32_t>(min(found, static_cast<uint32_t>(p.rows - 1)));
    write_child(p, row, j, i, p.scores[row] + shared.increments[j]);
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

// Three blocks an SM are enough; for more, ptxas would spill registers.
__global__ void __launch_bounds__(kThreads, 3) rank_slices(const TreeExpandParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<RankShared*>(dynamic_shared());
    const int slices = num_slices(p), slice = static_cast<int>(blockIdx.x % slices);
    const int number = static_cast<int>(blockIdx.x / slices), seq = number / p.width;
    if (is_closed(p, seq)) {
        if (slice == 0) close_row(p, number);
        return;
    }
    const RowScratch scratch = row_scratch(p, number);
    const DraftRow row(p, number);
    const uint32_t most = row_max(scratch, slices);
    const float top = from_ordered_bits(most);
    if (!is_bad(most)) rank_slice(p, row, scratch, seq, slice, top, shared);
    if (!is_last_block(scratch.rank_ticket, slices, &shared->flag)) return;
    find_best(&shared->best, is_bad(most) ? 0 : int64_t{slices} * p.top_k, p.top_k,
              [&](int64_t i) { return scratch.keys[i]; });
    if (shared->best.count > 0) find_increments(p, row, scratch, top, shared);
    if (shared->best.count < p.top_k)
        fill_children(p, is_bad(most) ? from_ordered_bits(0) : -INFINITY, shared);
    write_children(p, number, *shared);
    if (is_last_block(sequence_ticket(p, seq), p.width, &shared->flag))
        pick_frontier(p, seq, &shared->best);
}

}  // namespace

void tree_expand_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeExpandParams*>(params);
    if (p.batch == 0) return;
    const int64_t blocks = int64_t{p.batch} * p.width * expand_slices(p.rows);
    const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
    SPECRT_LAUNCH(scan_slices, (LaunchShape{grid, block, 0, kOverlaps}), stream, p);
    if (p.sampling) filter_rows(p, stream);
    SPECRT_LAUNCH(rank_slices, (LaunchShape{grid, block, sizeof(RankShared), kOverlaps}), stream,
                  p);
}

}  // namespace specrt
