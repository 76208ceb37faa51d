// A block has one sequence: it sorts the best of the pool, and then a thread has one rank.
//
// A candidate's parent is looked for among the better ones, by four threads. Whether it hangs on
// the root is seen by walking up, rank by rank: upwards ranks only fall, so the walk ends whatever
// the pool holds, and a tree of EAGLE-2 is few levels deep.
#include "core/best_keys.cuh"
#include "core/ptx.cuh"
#include "tree_build/tree_build.h"

namespace specrt {
namespace {

constexpr int kThreads = 512;
constexpr int kSeekers = kThreads / kMaxNodes;  // of a parent
constexpr int kRoot = -1, kNowhere = -2;        // in place of a parent's rank

struct RerankShared {
    BestKeys best;
    int up[kMaxNodes];    // the parent's rank
    int node[kMaxNodes];  // a rank's number in the tree
    unsigned words[kThreads / 32];
};

// The rank of each candidate's parent among the ranks before its own. All threads of the block must
// call.
__device__ __forceinline__ void find_parents(const int32_t* parents, RerankShared* shared) {
    const BestKeys& best = shared->best;
    const int rank = static_cast<int>(threadIdx.x) / kSeekers;
    const int part = static_cast<int>(threadIdx.x) % kSeekers;
    const bool is_ranked = rank < best.count;
    const int32_t parent = is_ranked ? parents[index_of(best.keys[rank])] : kRoot;
    int found = parent < 0 ? kRoot : kNowhere;
#pragma unroll 4
    for (int j = part; j < rank; j += kSeekers)
        if (index_of(best.keys[j]) == parent) found = j;
    for (int step = 1; step < kSeekers; step *= 2)
        found = max(found, __shfl_xor_sync(kFullWarp, found, step));
    if (is_ranked && part == 0) shared->up[rank] = found;
}

__device__ __forceinline__ void write_node(const TreeRerankParams& p, int64_t at, int32_t token,
                                           int32_t parent, float score) {
    p.draft_tokens[at] = token;
    p.parents[at] = parent;
    p.node_scores[at] = score;
}

__global__ void __launch_bounds__(kThreads) tree_rerank_sequence(const TreeRerankParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<RerankShared*>(dynamic_shared());
    const int64_t seq = blockIdx.x, pool = seq * p.pool_size, tree = seq * p.nodes;
    const int rank = static_cast<int>(threadIdx.x);
    const float* scores = p.pool_scores + pool;
    find_best(&shared->best, p.nodes > 1 ? p.num_candidates : 0, p.nodes - 1, [&](int64_t i) {
        const float score = scores[i];
        const bool is_usable = score > -INFINITY;
        return is_usable ? key_of(score, static_cast<int32_t>(i)) : 0;
    });
    const bool is_ranked = rank < shared->best.count;
    int32_t token = 0;
    float score = 0.0f;
    if (is_ranked) {  // on their way while parents are looked for
        const int64_t at = pool + index_of(shared->best.keys[rank]);
        token = p.pool_tokens[at];
        score = p.pool_scores[at];
    }
    find_parents(p.pool_parents + pool, shared);
    __syncthreads();
    const int up = is_ranked ? shared->up[rank] : kNowhere;
    int above = up;
    while (above >= 0) above = shared->up[above];
    const bool is_kept = above == kRoot;
    const Votes kept = block_votes(is_kept, shared->words);
    if (is_kept) shared->node[rank] = kept.before + 1;
    __syncthreads();
    if (is_kept) write_node(p, tree + kept.before + 1, token, up < 0 ? 0 : shared->node[up], score);
    if (rank == 0) {
        write_node(p, tree, p.roots[seq], -1, 0.0f);
        p.num_nodes[seq] = kept.total + 1;
    }
    for (int node = kept.total + 1 + rank; node < p.nodes; node += kThreads)
        write_node(p, tree + node, 0, 0, -INFINITY);
}

}  // namespace

void tree_rerank_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeRerankParams*>(params);
    if (p.batch == 0) return;
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)), dim3(kThreads),
                            sizeof(RerankShared), kOverlaps};
    SPECRT_LAUNCH(tree_rerank_sequence, shape, stream, p);
}

}  // namespace specrt
