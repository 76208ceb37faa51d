// What of a drafter's tree is believed: its tokens and parents, as far as they are a tree of the
// vocabulary's tokens within bounds. Root, depth and ancestors follow from that.
//
//   given      tokens   9  4  7  7  2      num_nodes 5, root 3, max_nodes >= 5
//              parents  8  0  0  1  4      node 4 is its own parent: the tree ends before it
//   settled    tokens   3  4  7  7  0      num_settled 4
//              parents -1  0  0  1  0
//              depth    0  1  1  2  0
//              ancestors       bit 0 is the root's
//                       1 11 101 1011 0    (binary)
//
// Parents stand before children, so what stands before the first breach is a tree again. Node 0's
// token and parent are not looked at: they are the engine's.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct TreeSettleParams {
    static constexpr int kMaxNodes = 128;
    static constexpr int kMaxWords = kMaxNodes / 64;

    const int32_t* draft_tokens;  // [B, M]
    const int32_t* parents;       // [B, M]
    const int32_t* num_nodes;     // [B]
    const int32_t* roots;         // [B]
    const int32_t* max_nodes;     // [B]
    int32_t* settled_tokens;      // [B, N]
    int32_t* settled_parents;     // [B, N]
    int32_t* depth;               // [B, N]
    uint64_t* ancestors;          // [B, N, W]
    int32_t* num_settled;         // [B]
    // From a sequence to the next; of ancestors, also from a node to the next.
    int64_t tokens_stride, parents_stride, settled_tokens_stride, settled_parents_stride,
        depth_stride, ancestors_stride[2];
    int32_t batch, given, nodes, words, vocab;  // given: M, nodes: N
};

// Nodes of a sequence that may be looked at: none of them lies outside of a tensor. May be below 1.
SPECRT_HD int32_t most_settled(const TreeSettleParams& p, int64_t seq) {
    const int32_t wanted = p.num_nodes[seq], allowed = p.max_nodes[seq];
    const int32_t room = p.given < p.nodes ? p.given : p.nodes;
    const int32_t most = wanted < allowed ? wanted : allowed;
    return most < room ? most : room;
}

// Whether node >= 1 may follow the nodes before it.
SPECRT_HD bool is_settled(const TreeSettleParams& p, int32_t node, int32_t token, int32_t parent) {
    return 0 <= parent && parent < node && 0 <= token && token < p.vocab;
}

SPECRT_DECLARE_CPU(tree_settle_part)
SPECRT_DECLARE_CUDA(tree_settle_cuda)

struct TreeSettleArgs {
    TensorView draft_tokens, parents, num_nodes, roots, max_nodes, settled_tokens, settled_parents,
        depth, ancestors, num_settled;
    int64_t vocab_size;
};
Launch tree_settle(const TreeSettleArgs& args);

}  // namespace specrt
