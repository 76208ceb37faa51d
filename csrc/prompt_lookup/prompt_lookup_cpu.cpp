// From the end of the history backwards, so that the most recent occurrences come first.
#include "prompt_lookup/prompt_lookup.h"

namespace specrt::SPECRT_ISA {
namespace {

struct Found {
    int32_t match = 0, count = 0;
    int32_t ends[PromptLookupParams::kMaxContinuations];
};

void look_up(const PromptLookupParams& p, const Searched& s, Found* found) {
    for (int32_t end = s.length - 1; end > 0; --end) {
        if (s.tokens[end - 1] != s.tokens[s.length - 1]) continue;
        const int32_t match = match_before(s, end, p.max_ngram);
        if (match < p.min_ngram || match < found->match) continue;
        if (match > found->match) {
            found->match = match;
            found->count = 0;
        }
        if (found->count < p.continuations) found->ends[found->count++] = end;
        if (match == p.max_ngram && found->count == p.continuations) return;
    }
}

struct Tree {
    int32_t *tokens, *parents;
    int32_t size, room;

    // The child of a node, made if it is not there; -1 if there is no room.
    int32_t child(int32_t node, int32_t token) {
        for (int32_t i = node + 1; i < size; ++i)
            if (parents[i] == node && tokens[i] == token) return i;
        return size < room ? put(node, token) : -1;
    }

    int32_t put(int32_t parent, int32_t token) {
        tokens[size] = token;
        parents[size] = parent;
        return size++;
    }
};

// How many tokens of the continuation from `end` on are in the tree.
int32_t add_path(const Searched& s, int32_t end, Tree* tree) {
    const int32_t period = s.length - end;
    int32_t node = 0;
    for (int32_t i = 0; i < s.depth; ++i) {
        node = tree->child(node, s.tokens[end + i % period]);
        if (node < 0) return i;
    }
    return s.depth;
}

void draft(const PromptLookupParams& p, int64_t seq) {
    const Searched s = searched_of(p, seq);
    Found found;
    if (s.depth > 0) look_up(p, s, &found);
    Tree tree{p.draft_tokens + seq * p.tokens_stride, p.parents + seq * p.parents_stride, 0,
              p.nodes};
    tree.put(-1, s.length > 0 ? s.tokens[s.length - 1] : 0);
    int32_t longest = 0;
    for (int32_t i = 0; i < found.count; ++i) {
        const int32_t count = add_path(s, found.ends[i], &tree);
        if (count > longest) longest = count;
    }
    p.num_nodes[seq] = tree.size;
    p.match_len[seq] = found.match;
    p.longest[seq] = longest;
    for (int32_t i = tree.size; i < p.nodes; ++i) tree.tokens[i] = tree.parents[i] = 0;
}

}  // namespace

void prompt_lookup_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const PromptLookupParams*>(params);
    const int64_t batch = p.batch;
    for (int64_t seq = batch * part / num_parts; seq < batch * (part + 1) / num_parts; ++seq)
        draft(p, seq);
}

}  // namespace specrt::SPECRT_ISA
