// Every row of every tree is drawn in parallel, before the walk: a node's ancestors are known from
// the parents, so its penalties are too. What the walk does not come to was drawn in vain, but a
// pass over all rows takes less time than as many passes one after the other as the path is long.
//
// 1. scan_rows: each slice's largest value; or, without a filter, its best score with noise. Where
//    the product left these for every 64 tokens, they are read instead of the logits.
// 2. weigh_rows: counts and masses by distance from the maximum, for top_k and top_p; the mass of
//    the logits as they are, for log-probabilities. A row's last block finds what is left open.
// 3. pick_tokens: of rows with a filter the best score among the kept, and the candidates. A row's
//    last block decides on these; a tree's last block walks.
//
// A row that is not concerned leaves a launch at once, so the number of launches is fixed. Blocks
// meet by tickets (core/reduce.cuh).
#include "core/ptx.cuh"
#include "tree_accept/walk.cuh"

namespace specrt {
namespace {

// What is the same for all threads lies in shared memory, and not in as many registers.
struct Shared {
    union {
        Chunk chunk;
        uint64_t keys[kCandidates];
    };
    KeptRoom kept;
    Lineage tree;
    Row row;
    RowState state;
    AcceptWorkspace w;
    RowSplit split;
    Span span;
    int64_t slice;
    WalkRoom walk;
    NoiseSearch noise;
    uint64_t words[kAcceptWarps];
};

// Where a block belongs, before it has read anything.
struct Address {
    RowSplit split;
    int64_t row, slice, seq;
    bool is_node;  // of the tree, and no padding
};

__device__ __forceinline__ Address this_address(const TreeAcceptParams& p) {
    Address at;
    at.split = split_rows(p.batch * p.nodes, p.vocab);
    at.row = blockIdx.x / at.split.num_slices;
    at.slice = blockIdx.x - at.row * at.split.num_slices;
    at.seq = at.row / p.nodes;
    at.is_node = at.row - at.seq * p.nodes < num_nodes_of(p, at.seq);
    return at;
}

__device__ __forceinline__ Shared* begin_block(const TreeAcceptParams& p, const Address& at) {
    auto* shared = reinterpret_cast<Shared*>(dynamic_shared());
    if (threadIdx.x == 0) {
        const int64_t first = at.slice * at.split.slice_chunks,
                      last = first + at.split.slice_chunks;
        shared->split = at.split;
        shared->slice = at.slice;
        shared->span = {first, last < at.split.num_chunks ? last : at.split.num_chunks};
        shared->w =
            accept_workspace(p.workspace, p.batch, p.nodes, p.vocab, p.draft_probs != nullptr);
    }
    read_row(p, at.row, &shared->row, &shared->tree);
    if (threadIdx.x == 0) shared->noise = {shared->row.s.seed, shared->row.position(p), 0};
    __syncthreads();
    return shared;
}

__device__ __forceinline__ SlicePart* parts_of(const Shared& shared) {
    return shared.w.parts + shared.row.index * shared.split.num_slices;
}

__device__ __forceinline__ bool is_last_slice(Shared* shared) {
    return is_last_block(shared->w.row_tickets + shared->row.index,
                         static_cast<unsigned>(shared->split.num_slices), &shared->kept.flag);
}

// What the first launch found of a whole row.
struct Scanned {
    uint64_t best = 0;
    uint32_t raw_top = 0;
    bool is_bad = false;

    // NaN, +inf, or every token masked.
    __device__ bool is_usable() const { return !is_bad && best >> 32 > kOrderedMinusInf; }
};

__device__ __forceinline__ Scanned scanned_row(const Shared& shared) {
    Scanned row;
    const SlicePart* parts = parts_of(shared);
    for (int64_t i = 0; i < shared.split.num_slices; ++i) {
        row.best = parts[i].best > row.best ? parts[i].best : row.best;
        row.raw_top = parts[i].raw_top > row.raw_top ? parts[i].raw_top : row.raw_top;
        row.is_bad = row.is_bad || parts[i].is_bad;
    }
    return row;
}

// f(tile) for all tokens of the block's slice, as they are or processed.
template <typename F>
__device__ __forceinline__ void for_slice(const TreeAcceptParams& p, Shared* shared, bool is_raw,
                                          F&& f) {
    for_tiles(p, shared->row, shared->tree, shared->span, is_raw, &shared->chunk, f);
}

// In ordered bits; of no meaning without log-probabilities.
__device__ __forceinline__ uint32_t raw_maximum(const TreeAcceptParams& p, Shared* shared) {
    if (!p.logprobs) return 0;
    MaxSearch raw;
    for_slice(p, shared, true, [&](const Tile& tile) { raw.visit(tile); });
    return static_cast<uint32_t>(block_largest(ordered_bits(raw.best), shared->words));
}

// Of a slice.
struct Found {
    uint64_t best;
    uint32_t raw_top;  // 0: not known
    bool is_bad;       // NaN or +inf
};

__device__ __forceinline__ Found scan_slice(const TreeAcceptParams& p, Shared* shared) {
    const bool is_drawn = shared->row.is_drawn_at_once(p.vocab);
    MaxSearch largest;
    for_slice(p, shared, false, [&](const Tile& tile) {
        largest.visit(tile);
        if (is_drawn) shared->noise.visit(tile);
    });
    const uint64_t best = block_largest(key_of(largest.best, largest.token), shared->words);
    const bool is_bad = __syncthreads_or(largest.is_bad);
    const bool is_raw = shared->row.is_greedy && !shared->row.is_edited;
    return {is_drawn ? shared->noise.best : best, is_raw ? static_cast<uint32_t>(best >> 32) : 0,
            is_bad};
}

// A key of no token is none of ours, and not to be followed.
__device__ __forceinline__ Found read_maxima(const TreeAcceptParams& p, Shared* shared) {
    constexpr int64_t kEach = kChunk / kTileTokens;
    const SamplingRow& s = shared->row.s;
    const int64_t count = num_token_tiles(p.vocab);
    const int64_t last = min(shared->span.last_chunk * kEach, count);
    const uint64_t* keys = p.maxima + shared->row.index * count;
    uint64_t best = 0;
    for (int64_t i = shared->span.first_chunk * kEach + threadIdx.x; i < last; i += blockDim.x)
        best = keys[i] > best ? keys[i] : best;
    best = block_largest(best, shared->words);
    __syncthreads();  // the words may be used again
    const int32_t token = index_of(best);
    const bool is_drawn = draws_unfiltered(s, p.vocab);
    const uint32_t raw_top = is_drawn ? 0 : static_cast<uint32_t>(best >> 32);
    if (is_filtered(s, p.vocab)) best = key_of(score_of(best) / s.temperature, token);
    return {best, raw_top, !(score_of(best) < kInf) || static_cast<uint32_t>(token) >= p.vocab};
}

__global__ void __launch_bounds__(kAcceptThreads, 2) scan_rows(const TreeAcceptParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const Address at = this_address(p);
    if (!at.is_node) return;
    Shared* shared = begin_block(p, at);
    if (!shared->row.is_live) return;
    const Found found = shared->row.has_maxima(p) ? read_maxima(p, shared) : scan_slice(p, shared);
    const uint32_t raw_top = found.raw_top != 0 ? found.raw_top : raw_maximum(p, shared);
    if (threadIdx.x != 0) return;
    SlicePart* part = parts_of(*shared) + shared->slice;
    part->best = found.best;
    part->raw_top = raw_top;
    part->is_bad = found.is_bad;
}

// --- masses
__device__ __forceinline__ void weigh_slice(const TreeAcceptParams& p, Shared* shared) {
    MassBins* bins = &shared->kept.bins;
    const float top = shared->state.top;
    bins->clear();
    const auto bin = [&](const Tile& tile, int r, int i) {
        return tile.x[r][i] > -kInf ? bin_of(tile.x[r][i], top) : -1;
    };
    for_slice(p, shared, false, [&](const Tile& tile) {
        add_tile(tile, bins, bin, [&](float x) { return mass_of(x - top); });
    });
    __syncthreads();
    const int64_t begin = int64_t{blockIdx.x} * kMassBins;
    for (int i = threadIdx.x; i < kMassBins; i += blockDim.x) {
        shared->w.bin_masses[begin + i] = bins->mass(i);
        shared->w.bin_counts[begin + i] = bins->count[i];
    }
}

__device__ __forceinline__ void weigh_raw_slice(const TreeAcceptParams& p, Shared* shared) {
    const float top = shared->state.raw_top;
    uint64_t sum = 0;
    for_slice(p, shared, true, [&](const Tile& tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += mass_of(tile.x[r][i] - top);
    });
    __syncthreads();
    sum = block_total(sum, shared->words);
    if (threadIdx.x == 0) parts_of(*shared)[shared->slice].raw_mass = sum;
}

__device__ __forceinline__ void set_cut(const Kept& kept, RowState* state) {
    if (threadIdx.x != 0) return;
    state->cut = kept.cut;
    state->cut_id = kept.cut_id;
    state->first_bin = 0;
    state->last_bin = -1;
}

// By the last block of a row: where candidates lie; or, if they would be too many, the cut.
__device__ __forceinline__ void narrow_row(const TreeAcceptParams& p, Shared* shared) {
    const Row& row = shared->row;
    RowState* state = &shared->state;
    const BinPair pair = sum_of_slices(shared->w, row.index, shared->split.num_slices);
    choose_bins(pair, row, p.vocab, &shared->kept.place, state);
    const bool is_open = state->first_bin <= state->last_bin;
    if (is_open && are_few(pair, *state, shared->words)) return;
    Kept kept;
    if (is_open) kept = kept_by_radix(p, row, shared->tree, *state, &shared->chunk, &shared->kept);
    set_cut(with_min_p(kept, row, state->top), state);
}

__global__ void __launch_bounds__(kAcceptThreads, 2) weigh_rows(const TreeAcceptParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const Address at = this_address(p);
    if (!at.is_node || !(is_weighed(p.sampling[at.seq], p.vocab) || p.logprobs)) return;
    Shared* shared = begin_block(p, at);
    if (!shared->row.is_live) return;
    const Scanned scanned = scanned_row(*shared);
    if (!scanned.is_usable()) return;
    if (threadIdx.x == 0) {
        shared->state = {};
        shared->state.top = score_of(scanned.best);
        shared->state.raw_top = from_ordered_bits(scanned.raw_top);
    }
    __syncthreads();
    if (is_weighed(shared->row.s, p.vocab)) weigh_slice(p, shared);
    if (p.logprobs) weigh_raw_slice(p, shared);
    if (!is_last_slice(shared)) return;
    if (is_weighed(shared->row.s, p.vocab)) narrow_row(p, shared);
    if (threadIdx.x != 0) return;
    if (p.logprobs)
        for (int64_t i = 0; i < shared->split.num_slices; ++i)
            shared->state.raw_total += parts_of(*shared)[i].raw_mass;
    shared->w.states[shared->row.index] = shared->state;
}

// --- tokens
__device__ __forceinline__ uint64_t* candidates_of(const TreeAcceptParams& p,
                                                   const Shared& shared) {
    return shared.w.candidates + shared.row.index * most_candidates(p.vocab);
}

__device__ __forceinline__ void pick_in_slice(const TreeAcceptParams& p, Shared* shared) {
    const RowState& state = shared->state;
    const bool is_open = state.first_bin <= state.last_bin;
    const Kept known =
        is_open ? with_min_p({}, shared->row, state.top) : Kept{state.cut, state.cut_id};
    uint64_t* candidates = candidates_of(p, *shared);
    uint32_t* number = shared->w.num_candidates + shared->row.index;
    for_slice(p, shared, false, [&](Tile tile) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = tile.x[r][i];
                const int bin = is_open && x > -kInf ? bin_of(x, state.top) : -1;
                if (state.first_bin <= bin && bin <= state.last_bin)
                    candidates[atomicAdd(number, 1u)] = key_of(x, tile.id(r, i));
                if (bin >= state.first_bin || !known.keeps(x, tile.id(r, i))) x = -kInf;
            }
        if (!shared->row.rejects) shared->noise.visit(tile);
    });
    __syncthreads();
    if (threadIdx.x == 0) parts_of(*shared)[shared->slice].drawn = shared->noise.best;
}

// Candidates come in any order, and are sorted; what is kept of them takes part in the draw.
__device__ __forceinline__ void judge_candidates(const TreeAcceptParams& p, Shared* shared) {
    const Row& row = shared->row;
    const uint64_t* candidates = candidates_of(p, *shared);
    const int number = static_cast<int>(shared->w.num_candidates[row.index]);
    int size = 64;
    while (size < number) size *= 2;
    for (int i = threadIdx.x; i < kCandidates; i += blockDim.x)
        shared->keys[i] = i < number ? candidates[i] : 0;
    __syncthreads();
    sort_keys(shared->keys, size);
    Kept kept = kept_by_candidates(shared->keys, row, shared->state, &shared->kept.place);
    kept = with_min_p(kept, row, shared->state.top);
    for (int i = threadIdx.x; i < number; i += blockDim.x) {
        const uint64_t key = shared->keys[i];
        if (!row.rejects && kept.keeps(score_of(key), index_of(key)))
            shared->noise.visit_one(score_of(key), index_of(key));
    }
    __syncthreads();
    set_cut(kept, &shared->state);
    if (threadIdx.x == 0) shared->w.num_candidates[row.index] = 0;
}

// A row with a filter; true in the block that ended it.
__device__ __forceinline__ bool pick_token(const TreeAcceptParams& p, float top, Shared* shared) {
    const Row& row = shared->row;
    const bool has_weights = is_weighed(row.s, p.vocab);
    RowState* stored = shared->w.states + row.index;
    if (threadIdx.x == 0 && (has_weights || p.logprobs)) shared->state = *stored;
    if (threadIdx.x == 0) shared->state.top = top;
    if (!has_weights) set_cut(with_min_p({}, row, top), &shared->state);
    __syncthreads();
    pick_in_slice(p, shared);
    if (!is_last_slice(shared)) return false;
    if (shared->state.first_bin <= shared->state.last_bin) judge_candidates(p, shared);
    if (threadIdx.x != 0) return true;
    uint64_t best = shared->noise.best;
    const SlicePart* parts = parts_of(*shared);
    for (int64_t i = 0; i < shared->split.num_slices; ++i)
        best = parts[i].drawn > best ? parts[i].drawn : best;
    shared->state.token = row.rejects ? 0 : best == 0 ? -1 : index_of(best);
    *stored = shared->state;
    return true;
}

// A row whose token, or whose maximum, the first launch found.
__device__ __forceinline__ void take_token(const Scanned& scanned, Shared* shared) {
    if (threadIdx.x != 0) return;
    RowState* state = shared->w.states + shared->row.index;
    state->top = score_of(scanned.best);
    state->cut = -kInf;
    state->cut_id = kAnyId;
    state->token = scanned.is_usable() ? index_of(scanned.best) : -1;
}

__global__ void __launch_bounds__(kAcceptThreads, 2) pick_tokens(const TreeAcceptParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    const Address at = this_address(p);
    const bool has_filter = is_filtered(p.sampling[at.seq], p.vocab);
    if (!at.is_node || (at.slice > 0 && !has_filter)) return;
    Shared* shared = begin_block(p, at);
    Scanned scanned;
    if (shared->row.is_live) scanned = scanned_row(*shared);
    if (scanned.is_usable() && has_filter) {
        if (!pick_token(p, score_of(scanned.best), shared)) return;
    } else {
        if (shared->slice > 0) return;
        take_token(scanned, shared);
    }
    const int64_t seq = shared->row.seq;
    if (!is_last_block(shared->w.tree_tickets + seq, static_cast<unsigned>(shared->row.num_nodes),
                       &shared->kept.flag))
        return;
    walk_tree(p, seq, shared->w, &shared->row, &shared->tree, &shared->chunk, &shared->kept,
              &shared->walk);
}

}  // namespace

void tree_accept_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeAcceptParams*>(params);
    const int64_t rows = p.batch * p.nodes;
    if (rows == 0) return;
    const int64_t blocks = rows * split_rows(rows, p.vocab).num_slices;
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kAcceptThreads),
                            sizeof(Shared), kOverlaps};
    SPECRT_LAUNCH(scan_rows, shape, stream, p);
    SPECRT_LAUNCH(weigh_rows, shape, stream, p);
    SPECRT_LAUNCH(pick_tokens, shape, stream, p);
}

}  // namespace specrt
