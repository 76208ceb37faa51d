// A block has one sequence: it sorts the best of the pool, and then a thread has one rank.
//
// A candidate's parent is looked for among the better ones. Whether it hangs on the root is seen by
// walking up, rank by rank: upwards ranks only fall, so the walk ends whatever the pool holds, and
// a tree of EAGLE-2 is few levels deep.
#include "core/best_keys.cuh"
#include "core/ptx.cuh"
#include "tree_build/tree_build.h"

namespace specrt {
namespace {

constexpr int kThreads = 512;
constexpr int kRoot = -1, kNowhere = -2;  // in place of a parent's rank

struct RerankShared {
    BestKeys best;
    int up[kMaxNodes];    // the parent's rank
    int node[kMaxNodes];  // a rank's number in the tree
    unsigned words[kThreads / 32];
};

// The rank of a candidate's parent among the ranks before its own.
__device__ __forceinline__ int rank_of_parent(const BestKeys& best, int32_t parent, int rank) {
    if (parent < 0) return kRoot;
    int found = kNowhere;
    for (int j = 0; j < rank; ++j)
        if (index_of(best.keys[j]) == parent) found = j;
    return found;
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
    int64_t at = pool;
    int up = kNowhere;
    if (is_ranked) {
        at += index_of(shared->best.keys[rank]);
        up = rank_of_parent(shared->best, p.pool_parents[at], rank);
        shared->up[rank] = up;
    }
    __syncthreads();
    int above = up;
    while (above >= 0) above = shared->up[above];
    const bool is_kept = above == kRoot;
    const Votes kept = block_votes(is_kept, shared->words);
    if (is_kept) shared->node[rank] = kept.before + 1;
    __syncthreads();
    if (is_kept)
        write_node(p, tree + kept.before + 1, p.pool_tokens[at], up < 0 ? 0 : shared->node[up],
                   p.pool_scores[at]);
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
