// Token Recycling's two steps (arXiv 2408.08696). A table holds for each token the R likeliest next
// ones, best first, as a verified row of that token had them last; a template says of each node
// which of its parent's next tokens it is.
//
//   template   parents  -1  0  0  1        root 3; table row 3:  8 5    row 8:  2 9
//              ranks     0  0  1  1
//   proposed   tokens    3  8  5  9
//
// Learning takes each row of logits that a tree's node has. Of several nodes of one token the last
// on the accepted path counts; where none was accepted, the first.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/score_key.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

constexpr int kMaxRanks = 32;
constexpr int kMaxRecycledNodes = 128;

// Ids, ranks and parents may be anything: the nearest that there is stands for them.
SPECRT_HD int32_t nearest(int32_t index, int32_t count) {
    return index < 0 ? 0 : index < count ? index : count - 1;
}

// A slot that there is none of is the last one.
SPECRT_HD int64_t slot_of(int32_t slot, int32_t count) {
    return 0 <= slot && slot < count ? slot : count - 1;
}

struct RecycleProposeParams {
    const int32_t* tables;   // [S, V, R]
    const int32_t* slots;    // [B]: whose table is where
    const int32_t* roots;    // [B]
    const int32_t* parents;  // [M]
    const int32_t* ranks;    // [M]
    int32_t* draft_tokens;   // [B, M]
    int64_t tokens_stride;
    int32_t batch, num_slots, vocab, num_ranks, nodes;  // nodes: M
};

// The token of a node below one of token `above`.
SPECRT_HD int32_t next_token(const RecycleProposeParams& p, int64_t seq, int32_t node,
                             int32_t above) {
    const int64_t row = slot_of(p.slots[seq], p.num_slots) * p.vocab + above;
    return nearest(p.tables[row * p.num_ranks + nearest(p.ranks[node], p.num_ranks)], p.vocab);
}

// Of a node behind the root: one of the nodes before it.
SPECRT_HD int32_t parent_of(const RecycleProposeParams& p, int32_t node) {
    return nearest(p.parents[node], node);
}

struct RecycleLearnParams {
    const float* logits;           // [B, N, V]
    const int32_t* draft_tokens;   // [B, N]
    const int32_t* num_nodes;      // [B]
    const int32_t* path;           // [B, P] accepted nodes, then -1
    const int32_t* accept_length;  // [B]: below 0, a sequence of bad logits teaches nothing
    const int32_t* slots;          // [B]
    int32_t* tables;               // [S, V, R]
    int32_t* is_own;               // [S, V]: 1 of rows that were learned
    uint32_t* workspace;           // a GPU's
    int64_t logits_stride[2];
    int64_t tokens_stride, path_stride, workspace_size;
    int32_t batch, nodes, vocab, path_size, num_slots, num_ranks, num_kept;  // kept: min(R, V)
};

// Nodes of a sequence that teach.
SPECRT_HD int32_t num_teaching(const RecycleLearnParams& p, int64_t seq) {
    const int32_t count = p.num_nodes[seq] < p.nodes ? p.num_nodes[seq] : p.nodes;
    return p.accept_length[seq] < 0 ? 0 : count;
}

// Of two nodes of one token the one of higher priority counts; no two are equal.
SPECRT_HD int32_t priority_of(const RecycleLearnParams& p, int32_t node, bool is_accepted) {
    return is_accepted ? node + p.nodes : p.nodes - 1 - node;
}

// Of a row of a table and its mark.
SPECRT_HD int64_t learned_row(const RecycleLearnParams& p, int64_t seq, int32_t token) {
    return slot_of(p.slots[seq], p.num_slots) * p.vocab + token;
}

// A GPU's workspace, in words of 4 bytes. Tickets, which are 0 between launches, are counted from
// its end, so that a smaller batch or tree than it was made for finds them where they were.
//
//     | row 0: best keys of each slice | row 1 | ...        ... | tickets |
constexpr int64_t kRecycleSlice = 4096;  // tokens of a row, for one block of threads

constexpr int64_t recycle_slices(int64_t vocab) {
    return (vocab + kRecycleSlice - 1) / kRecycleSlice;
}
constexpr int64_t recycle_learn_workspace(int64_t rows, int64_t vocab, int64_t num_ranks) {
    return rows * (2 * recycle_slices(vocab) * num_ranks + 1);
}

SPECRT_DECLARE_CPU(recycle_propose_part)
SPECRT_DECLARE_CPU(recycle_learn_part)
SPECRT_DECLARE_CUDA(recycle_propose_cuda)
SPECRT_DECLARE_CUDA(recycle_learn_cuda)

struct RecycleProposeArgs {
    TensorView tables, slots, roots, parents, ranks, draft_tokens;
};
Launch recycle_propose(const RecycleProposeArgs& args);

struct RecycleLearnArgs {
    TensorView logits, draft_tokens, num_nodes, path, accept_length, slots, tables, is_own,
        workspace;
};
Launch recycle_learn(const RecycleLearnArgs& args);

}  // namespace specrt
