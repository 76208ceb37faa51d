// Node by node: a node's depth and ancestors are its parent's, which stands before it, and itself.
#include "tree_settle/tree_settle.h"

namespace specrt::SPECRT_ISA {
namespace {

struct Tree {
    int32_t *tokens, *parents, *depth;
    uint64_t* ancestors;
    int64_t bits_stride;
    int32_t words;

    Tree(const TreeSettleParams& p, int64_t seq)
        : tokens(p.settled_tokens + seq * p.settled_tokens_stride),
          parents(p.settled_parents + seq * p.settled_parents_stride),
          depth(p.depth + seq * p.depth_stride),
          ancestors(p.ancestors + seq * p.ancestors_stride[0]),
          bits_stride(p.ancestors_stride[1]),
          words(p.words) {}

    uint64_t* bits(int32_t node) const { return ancestors + node * bits_stride; }

    void clear(int32_t node) const {
        tokens[node] = parents[node] = depth[node] = 0;
        for (int32_t word = 0; word < words; ++word) bits(node)[word] = 0;
    }

    void put_root(int32_t token) const {
        clear(0);
        tokens[0] = token;
        parents[0] = -1;
        bits(0)[0] = 1;
    }

    void put(int32_t node, int32_t token, int32_t parent) const {
        tokens[node] = token;
        parents[node] = parent;
        depth[node] = depth[parent] + 1;
        for (int32_t word = 0; word < words; ++word) bits(node)[word] = bits(parent)[word];
        bits(node)[node / 64] |= uint64_t{1} << (node % 64);
    }
};

void settle(const TreeSettleParams& p, int64_t seq) {
    const Tree tree(p, seq);
    const int32_t* tokens = p.draft_tokens + seq * p.tokens_stride;
    const int32_t* parents = p.parents + seq * p.parents_stride;
    const int32_t most = most_settled(p, seq);
    tree.put_root(p.roots[seq]);
    int32_t count = 1;
    for (; count < most; ++count) {
        const int32_t token = tokens[count], parent = parents[count];
        if (!is_settled(p, count, token, parent)) break;
        tree.put(count, token, parent);
    }
    p.num_settled[seq] = count;
    for (int32_t node = count; node < p.nodes; ++node) tree.clear(node);
}

}  // namespace

void tree_settle_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const TreeSettleParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
        settle(p, seq);
}

}  // namespace specrt::SPECRT_ISA
