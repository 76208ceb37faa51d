// Drafts out of a sequence's own history: the longest suffix that occurred before, its most recent
// occurrences, and what followed each of them, merged into one tree.
//
//   history   8 9 1 2 3 0 8 9 1 8 9      the suffix 8 9 ended before place 8, and before place 2
//   paths     1 8 9 1 8                  from place 8: what runs into the end goes on as if it
//             1 2 3 0 8                  repeated
//   tree      9 | 1 8 9 1 8 | 2 3 0 8    nodes in the order in which they are added; as many as
//                                        there is room for
//
// A path ends before the first node that there is no room for; the next one may still share nodes.
#pragma once
#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/tensor_view.h"
#include "core/thread_pool.h"

namespace specrt {

struct PromptLookupParams {
    static constexpr int kMaxNodes = 128;
    static constexpr int kMaxContinuations = 128;

    const int32_t* history;      // [B, T]
    const int32_t* history_len;  // [B]
    const int32_t* max_len;      // [B]
    int32_t* draft_tokens;       // [B, M]
    int32_t* parents;            // [B, M]
    int32_t* num_nodes;          // [B]
    int32_t* match_len;          // [B]
    int32_t* longest;            // [B]
    // From a sequence to the next.
    int64_t history_stride, tokens_stride, parents_stride;
    int32_t batch, slots, nodes;  // B, T, M
    int32_t max_ngram, min_ngram, continuations, depth;
};

// What a sequence has to look in, and how long a continuation may be; whatever its numbers hold.
struct Searched {
    const int32_t* tokens;
    int32_t length;  // 0 to T
    int32_t depth;   // 0: nothing is looked for
};

SPECRT_HD Searched searched_of(const PromptLookupParams& p, int64_t seq) {
    Searched s{p.history + seq * p.history_stride, p.history_len[seq], p.depth};
    s.length = s.length < 0 ? 0 : s.length < p.slots ? s.length : p.slots;
    // The bonus token takes the last place.
    const int64_t room = int64_t{p.max_len[seq]} - s.length - 1;
    if (room < s.depth) s.depth = room > 0 ? static_cast<int32_t>(room) : 0;
    if (p.nodes - 1 < s.depth) s.depth = p.nodes - 1;
    return s;
}

// How many tokens before place `end` are those before the history's end, at most `most`. The last
// one is: that is for the caller to have seen.
SPECRT_HD int32_t match_before(const Searched& s, int32_t end, int32_t most) {
    if (end < most) most = end;
    int32_t match = 1;
    while (match < most && s.tokens[end - 1 - match] == s.tokens[s.length - 1 - match]) ++match;
    return match;
}

SPECRT_DECLARE_CPU(prompt_lookup_part)
SPECRT_DECLARE_CUDA(prompt_lookup_cuda)

struct PromptLookupArgs {
    TensorView history, history_len, max_len;
    int64_t max_ngram, min_ngram, num_continuations, depth;
    TensorView draft_tokens, parents, num_nodes, match_len, longest;
};
Launch prompt_lookup(const PromptLookupArgs& args);

}  // namespace specrt
