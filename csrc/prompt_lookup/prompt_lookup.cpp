#include "prompt_lookup/prompt_lookup.h"

namespace specrt {
namespace {

void check(const PromptLookupArgs& a) {
    expect(a.history, DType::kInt32, "[B, T]", -1, -1);
    const int64_t batch = a.history.shape[0];
    SPECRT_CHECK(a.history.shape[1] <= INT32_MAX, "history: expected less than 2^31 columns, got ",
                 a.history.describe());
    expect(a.draft_tokens, DType::kInt32, "[B, M]", batch, -1);
    const int64_t nodes = a.draft_tokens.shape[1];
    SPECRT_CHECK(1 <= nodes && nodes <= PromptLookupParams::kMaxNodes,
                 "draft_tokens: expected 1 <= M <= ", PromptLookupParams::kMaxNodes, ", got ",
                 a.draft_tokens.describe());
    expect(a.parents, DType::kInt32, "[B, M]", batch, nodes);
    for (const TensorView* t : {&a.history_len, &a.max_len, &a.num_nodes, &a.match_len, &a.longest})
        expect(*t, DType::kInt32, "[B]", batch);
    SPECRT_CHECK(1 <= a.max_ngram && a.max_ngram <= INT32_MAX,
                 "max_ngram: expected 1 to 2^31 - 1, got ", a.max_ngram);
    SPECRT_CHECK(1 <= a.min_ngram && a.min_ngram <= a.max_ngram,
                 "min_ngram: expected 1 to max_ngram = ", a.max_ngram, ", got ", a.min_ngram);
    SPECRT_CHECK(
        1 <= a.num_continuations && a.num_continuations <= PromptLookupParams::kMaxContinuations,
        "num_continuations: expected 1 to ", PromptLookupParams::kMaxContinuations, ", got ",
        a.num_continuations);
    SPECRT_CHECK(0 <= a.depth && a.depth <= INT32_MAX, "depth: expected 0 to 2^31 - 1, got ",
                 a.depth);
    for (const TensorView* in : {&a.history, &a.history_len, &a.max_len})
        for (const TensorView* out :
             {&a.draft_tokens, &a.parents, &a.num_nodes, &a.match_len, &a.longest})
            expect_apart(*in, *out);
}

PromptLookupParams params_of(const PromptLookupArgs& a) {
    PromptLookupParams p{};
    p.history = a.history.as<int32_t>();
    p.history_len = a.history_len.as<int32_t>();
    p.max_len = a.max_len.as<int32_t>();
    p.draft_tokens = a.draft_tokens.as<int32_t>();
    p.parents = a.parents.as<int32_t>();
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.match_len = a.match_len.as<int32_t>();
    p.longest = a.longest.as<int32_t>();
    p.history_stride = a.history.stride[0];
    p.tokens_stride = a.draft_tokens.stride[0];
    p.parents_stride = a.parents.stride[0];
    p.batch = static_cast<int32_t>(a.history.shape[0]);
    p.slots = static_cast<int32_t>(a.history.shape[1]);
    p.nodes = static_cast<int32_t>(a.draft_tokens.shape[1]);
    p.max_ngram = static_cast<int32_t>(a.max_ngram);
    p.min_ngram = static_cast<int32_t>(a.min_ngram);
    p.continuations = static_cast<int32_t>(a.num_continuations);
    p.depth = static_cast<int32_t>(a.depth);
    return p;
}

}  // namespace

Launch prompt_lookup(const PromptLookupArgs& a) {
    check(a);
    const PromptLookupParams p = params_of(a);
    const int device = common_device(a.history, a.history_len, a.max_len, a.draft_tokens, a.parents,
                                     a.num_nodes, a.match_len, a.longest);
    if (device != kCpu) return make_cuda_launch(prompt_lookup_cuda, p, device);
    // A thread has looked at 8192 places before another one could have started.
    const int64_t parts = 1 + int64_t{p.batch} * p.slots / 8192;
    return make_launch(prompt_lookup_part_for(active_isa()), p, parts < p.batch ? parts : p.batch);
}

}  // namespace specrt
