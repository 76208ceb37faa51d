// A block has one sequence, a thread one node: node i is lane i % 32 of warp i / 32.
//
// 1. Each thread judges its own node by itself (parent before it, token in the vocabulary, within
//    bounds). A warp's verdicts are one ballot; the first 0 over the warps' words in order is where
//    the tree ends. Which nodes a hostile parent points to has not been looked at by then.
// 2. Ancestors by pointer jumping. One after another would be a chain of as many dependent loads
//    from shared memory as there are nodes, some 30 cycles each: 2 us for 128, as long as the
//    launch. Instead every node knows `bits`, itself and its nearest ancestors, and `up`, the next
//    one above those, and takes over what `up` knows: what is known doubles.
//
//        a chain 0-1-2-3-4     node 4 knows     its up
//        at first              4                3
//        after round 1         3 4              2
//        after round 2         1 2 3 4          0
//        after round 3         0 1 2 3 4        0
//
//    The root is its own `up`: what it knows again and again changes nothing, so no node has to
//    stop. Rounds depend on the number of nodes alone, which is the block's: no vote on whether
//    the deepest has arrived, which would cost what a round costs.
// 3. Depth is the number of ancestors.
//
// Hazard: who read a node's `bits` from before a round and its `up` from after it would skip the
// ancestors between. So a round reads one copy of what is known and writes another, and one barrier
// a round keeps a fast warp from overwriting what a slow one still reads. (The shim cannot show
// this: it lets nobody in between two reads of a thread.)
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "tree_settle/tree_settle.h"

namespace specrt {
namespace {

constexpr int kMaxNodes = TreeSettleParams::kMaxNodes;
constexpr int kMaxWarps = kMaxNodes / 32;

// A word of 64 nodes after the other, as a warp's lanes then read neighbours where parents are.
struct Known {
    uint64_t low[kMaxNodes], high[kMaxNodes];
    int32_t up[kMaxNodes];
};

struct Shared {
    Known known[2];
    unsigned verdicts[kMaxWarps];
};

struct Node {
    uint64_t low, high;
    int32_t up;
};

__device__ __forceinline__ void put(Known* known, int node, const Node& value) {
    known->low[node] = value.low;
    known->high[node] = value.high;
    known->up[node] = value.up;
}

// How many nodes stand before the first that does not. All threads of the block must call.
__device__ __forceinline__ int count_settled(bool is_standing, unsigned* verdicts) {
    const unsigned standing = __ballot_sync(kFullWarp, is_standing);
    if (threadIdx.x % 32 == 0) verdicts[threadIdx.x / 32] = standing;
    __syncthreads();
    const int num_warps = static_cast<int>(blockDim.x / 32);
    for (int warp = 0; warp < num_warps; ++warp)
        if (verdicts[warp] != kFullWarp)
            return 32 * warp + __ffs(static_cast<int>(~verdicts[warp])) - 1;
    return 32 * num_warps;
}

// The node and all above it. All threads of the block must call; those past `count` get rubbish,
// and nobody reads theirs: a settled node's ancestors are settled.
__device__ __forceinline__ Node with_ancestors(int node, int parent, int count, Known* known) {
    const uint64_t own = uint64_t{1} << (node % 64);
    Node mine{node < 64 ? own : 0, node < 64 ? 0 : own, node < count && node > 0 ? parent : 0};
    put(known, node, mine);
    __syncthreads();
    int from = 0;
    for (int covered = 1; covered < count; covered *= 2, from ^= 1) {
        const Known& above = known[from];
        const int up = mine.up;
        mine = {mine.low | above.low[up], mine.high | above.high[up], above.up[up]};
        put(known + (from ^ 1), node, mine);
        __syncthreads();
    }
    return mine;
}

__global__ void __launch_bounds__(kMaxNodes) tree_settle_sequence(const TreeSettleParams p) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    auto* shared = reinterpret_cast<Shared*>(dynamic_shared());
    const int64_t seq = blockIdx.x;
    const int node = static_cast<int>(threadIdx.x), most = most_settled(p, seq);
    int32_t token = p.roots[seq], parent = -1;
    if (node > 0 && node < most) {
        token = p.draft_tokens[seq * p.tokens_stride + node];
        parent = p.parents[seq * p.parents_stride + node];
    }
    const bool is_standing = node == 0 || (node < most && is_settled(p, node, token, parent));
    const int count = count_settled(is_standing, shared->verdicts);
    const Node mine = with_ancestors(node, parent, count, shared->known);
    if (node == 0) p.num_settled[seq] = count;
    if (node >= p.nodes) return;  // the last warp's lanes without a node
    const bool is_kept = node < count;
    p.settled_tokens[seq * p.settled_tokens_stride + node] = is_kept ? token : 0;
    p.settled_parents[seq * p.settled_parents_stride + node] = is_kept ? parent : 0;
    p.depth[seq * p.depth_stride + node] =
        is_kept ? __popcll(mine.low) + __popcll(mine.high) - 1 : 0;
    uint64_t* bits = p.ancestors + seq * p.ancestors_stride[0] + node * p.ancestors_stride[1];
    bits[0] = is_kept ? mine.low : 0;
    if (p.words > 1) bits[1] = is_kept ? mine.high : 0;
}

}  // namespace

void tree_settle_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const TreeSettleParams*>(params);
    if (p.batch == 0) return;
    const LaunchShape shape{dim3(static_cast<unsigned>(p.batch)), dim3(32 * ceil_div(p.nodes, 32)),
                            sizeof(Shared), kOverlaps};
    SPECRT_LAUNCH(tree_settle_sequence, shape, stream, p);
}

}  // namespace specrt
