// Proposing: a block has one sequence, a thread one node. A node's token is known once its
// parent's is, so each trip to the table makes one level, of all nodes at once. The levels are not
// told: parents stand before children, so every trip makes at least one node, whatever they hold.
//
// Learning: a row is shared by blocks of threads, a slice of 4096 tokens each, and read from memory
// once.
//
// 1. Each thread has the best key of its own 16 tokens. The R-th of these is what R tokens at
//    least do not lie below, so of the others only those above it are offered: at most 15 of each
//    of R threads. What is left is sorted, and the best R go to the workspace.
// 2. Whoever comes last of a row picks the best R of all slices and writes the table.
//
// Rows that teach nothing (padding, another row of the token counts) are left at once. What is
// ordered is ordered as keys (core/score_key.h): no bit depends on who comes when.
#include "core/best_keys.cuh"
#include "core/ptx.cuh"
#include "token_recycle/token_recycle.h"

namespace specrt {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = static_cast<int>(kRecycleSlice) / kThreads;  // tokens of a thread
static_assert(kThreads + kMaxRanks * kEach <= kKeyRoom && kMaxRecycledNodes <= kThreads);

__global__ void __launch_bounds__(kMaxRecycledNodes)
    recycle_propose_tree(const RecycleProposeParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    SPECRT_SHARED(int32_t[kMaxRecycledNodes], tokens);  // -1: not known yet
    const int64_t seq = blockIdx.x;
    const int node = static_cast<int>(threadIdx.x);
    bool is_open = 0 < node && node < p.nodes;
    const int parent = is_open ? parent_of(p, node) : 0;
    tokens[node] = node == 0 ? nearest(p.roots[seq], p.vocab) : -1;
    while (__syncthreads_or(is_open)) {
        const int32_t above = is_open ? tokens[parent] : -1;
        __syncthreads();  // all have read before any writes
        if (above < 0) continue;
        tokens[node] = next_token(p, seq, node, above);
        is_open = false;
    }
    if (node < p.nodes) p.draft_tokens[seq * p.tokens_stride + node] = tokens[node];
}

struct LearnShared {
    BestKeys best;
    bool is_accepted[kMaxRecycledNodes];
    int flag;
};

struct SliceScratch {
    unsigned long long* keys;  // [slices, R] of a row
    unsigned* ticket;

    __device__ __forceinline__ SliceScratch(const RecycleLearnParams& p, int64_t row)
        : keys(reinterpret_cast<unsigned long long*>(p.workspace) +
               row * recycle_slices(p.vocab) * p.num_ranks),
          ticket(p.workspace + p.workspace_size - 1 - row) {}
};

// Whether the node's row is to be learned. All threads of the block must call, and get the same.
__device__ __forceinline__ bool counts(const RecycleLearnParams& p, int64_t seq, int32_t node,
                                       LearnShared* shared) {
    const int32_t me = static_cast<int32_t>(threadIdx.x), count = num_teaching(p, seq);
    if (node >= count) return false;
    const int32_t* tokens = p.draft_tokens + seq * p.tokens_stride;
    const int32_t token = tokens[node], other = me < count ? tokens[me] : -1;
    if (token < 0 || token >= p.vocab) return false;
    if (me < kMaxRecycledNodes) shared->is_accepted[me] = false;
    __syncthreads();
    for (int32_t i = me; i < p.path_size; i += kThreads) {
        const int32_t accepted = p.path[seq * p.path_stride + i];
        if (0 <= accepted && accepted < count) shared->is_accepted[accepted] = true;
    }
    __syncthreads();
    const bool is_better = me < count && other == token &&
                           priority_of(p, me, shared->is_accepted[me]) >
                               priority_of(p, node, shared->is_accepted[node]);
    return !__syncthreads_or(is_better);
}

// The best R of a slice, fewer at a row's end, into best->keys. All threads of the block must call.
__device__ __forceinline__ void find_best_of_slice(const RecycleLearnParams& p, const float* row,
                                                   int64_t slice, BestKeys* best) {
    const int64_t first = slice * kRecycleSlice + threadIdx.x;
    const auto key = [&](int i) {
        const int64_t token = first + kThreads * i;
        return token < p.vocab ? key_of(row[token], static_cast<int32_t>(token)) : 0;
    };
    uint64_t mine = 0;
#pragma unroll  // all on their way at once
    for (int i = 0; i < kEach; ++i) mine = key(i) > mine ? key(i) : mine;
    clear_keys(best);
    offer_key(best, mine, 0);
    __syncthreads();
    const uint64_t bound = keep_best(best, p.num_kept);
#pragma unroll 4  // again out of the L1 cache: kept in registers, some would spill
    for (int i = 0; i < kEach; ++i)
        if (key(i) != mine) offer_key(best, key(i), bound);
    __syncthreads();
    keep_best(best, p.num_kept);
}

__global__ void __launch_bounds__(kThreads) recycle_learn_rows(const RecycleLearnParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<LearnShared*>(dynamic_shared());
    const int slices = static_cast<int>(recycle_slices(p.vocab));
    const int64_t number = blockIdx.x / slices, slice = blockIdx.x % slices;
    const int64_t seq = number / p.nodes;
    const int node = static_cast<int>(number % p.nodes), rank = static_cast<int>(threadIdx.x);
    if (!counts(p, seq, node, shared)) return;
    const float* row = p.logits + seq * p.logits_stride[0] + node * p.logits_stride[1];
    find_best_of_slice(p, row, slice, &shared->best);
    const SliceScratch scratch(p, number);
    if (rank < p.num_ranks)
        scratch.keys[slice * p.num_ranks + rank] =
            rank < shared->best.count ? shared->best.keys[rank] : 0;
    if (!is_last_block(scratch.ticket, static_cast<unsigned>(slices), &shared->flag)) return;
    find_best(&shared->best, int64_t{slices} * p.num_ranks, p.num_kept,
              [&](int64_t i) { return scratch.keys[i]; });
    const int64_t learned = learned_row(p, seq, p.draft_tokens[seq * p.tokens_stride + node]);
    if (rank < p.num_kept)
        p.tables[learned * p.num_ranks + rank] =
            nearest(index_of(shared->best.keys[rank]), p.vocab);
    if (rank == 0) p.is_own[learned] = 1;
}

}  // namespace

void recycle_propose_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const RecycleProposeParams*>(params);
    if (p.batch == 0) return;
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)), dim3(32 * ceil_div(p.nodes, 32)),
                            0, kOverlaps};
    SPECRT_LAUNCH(recycle_propose_tree, shape, stream, p);
}

void recycle_learn_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const RecycleLearnParams*>(params);
    if (p.batch == 0) return;
    const int64_t blocks = int64_t{p.batch} * p.nodes * recycle_slices(p.vocab);
    const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                            sizeof(LearnShared), kOverlaps};
    SPECRT_LAUNCH(recycle_learn_rows, shape, stream, p);
}

}  // namespace specrt
