// A part has whole sequences, so that no two write one table.
#include "token_recycle/token_recycle.h"

namespace specrt::SPECRT_ISA {
namespace {

void propose(const RecycleProposeParams& p, int64_t seq) {
    int32_t* tokens = p.draft_tokens + seq * p.tokens_stride;
    tokens[0] = nearest(p.roots[seq], p.vocab);
    for (int32_t node = 1; node < p.nodes; ++node)
        tokens[node] = next_token(p, seq, node, tokens[parent_of(p, node)]);
}

// The best `count` of a row, sorted.
void find_best(const float* row, int32_t vocab, int32_t count, uint64_t* best) {
    for (int32_t rank = 0; rank < count; ++rank) best[rank] = 0;
    float least = 0.0f;
    bool is_full = false;
    for (int32_t token = 0; token < vocab; ++token) {
        if (is_full && row[token] <= least) continue;  // its equals come behind it
        const uint64_t key = key_of(row[token], token);
        int32_t rank = count;
        for (; rank > 0 && best[rank - 1] < key; --rank)
            if (rank < count) best[rank] = best[rank - 1];
        if (rank < count) best[rank] = key;
        is_full = best[count - 1] > 0;
        least = score_of(best[count - 1]);
    }
}

struct Nodes {
    bool is_accepted[kMaxRecycledNodes] = {};
    const int32_t* tokens;
    int32_t count;

    Nodes(const RecycleLearnParams& p, int64_t seq)
        : tokens(p.draft_tokens + seq * p.tokens_stride), count(num_teaching(p, seq)) {
        const int32_t* path = p.path + seq * p.path_stride;
        for (int32_t i = 0; i < p.path_size; ++i)
            if (0 <= path[i] && path[i] < count) is_accepted[path[i]] = true;
    }

    bool counts(const RecycleLearnParams& p, int32_t node) const {
        if (tokens[node] < 0 || tokens[node] >= p.vocab) return false;
        const int32_t mine = priority_of(p, node, is_accepted[node]);
        for (int32_t other = 0; other < count; ++other)
            if (tokens[other] == tokens[node] && priority_of(p, other, is_accepted[other]) > mine)
                return false;
        return true;
    }
};

void learn(const RecycleLearnParams& p, int64_t seq) {
    const Nodes nodes(p, seq);
    const float* logits = p.logits + seq * p.logits_stride[0];
    for (int32_t node = 0; node < nodes.count; ++node) {
        if (!nodes.counts(p, node)) continue;
        uint64_t best[kMaxRanks];
        find_best(logits + node * p.logits_stride[1], p.vocab, p.num_kept, best);
        const int64_t row = learned_row(p, seq, nodes.tokens[node]);
        for (int32_t rank = 0; rank < p.num_kept; ++rank)
            p.tables[row * p.num_ranks + rank] = index_of(best[rank]);
        p.is_own[row] = 1;
    }
}

}  // namespace

void recycle_propose_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const RecycleProposeParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
        propose(p, seq);
}

void recycle_learn_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const RecycleLearnParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
        learn(p, seq);
}

}  // namespace specrt::SPECRT_ISA
