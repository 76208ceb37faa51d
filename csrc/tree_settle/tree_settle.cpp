#include "tree_settle/tree_settle.h"

namespace specrt {
namespace {

void check(const TreeSettleArgs& a) {
    expect(a.draft_tokens, DType::kInt32, "[B, M]", -1, -1);
    const int64_t batch = a.draft_tokens.shape[0], given = a.draft_tokens.shape[1];
    SPECRT_CHECK(given <= INT32_MAX, "draft_tokens: expected M < 2^31, got ",
                 a.draft_tokens.describe());
    expect(a.parents, DType::kInt32, "[B, M]", batch, given);
    expect(a.settled_tokens, DType::kInt32, "[B, N]", batch, -1);
    const int64_t nodes = a.settled_tokens.shape[1];
    SPECRT_CHECK(1 <= nodes && nodes <= TreeSettleParams::kMaxNodes,
                 "settled_tokens: expected 1 <= N <= ", TreeSettleParams::kMaxNodes, ", got ",
                 a.settled_tokens.describe());
    for (const TensorView* t : {&a.settled_parents, &a.depth})
        expect(*t, DType::kInt32, "[B, N]", batch, nodes);
    for (const TensorView* t : {&a.num_nodes, &a.roots, &a.max_nodes, &a.num_settled})
        expect(*t, DType::kInt32, "[B]", batch);
    expect(a.ancestors, DType::kInt64, "[B, N, W]", batch, nodes, -1);
    const int64_t words = a.ancestors.shape[2];
    SPECRT_CHECK(words <= TreeSettleParams::kMaxWords && 64 * words >= nodes,
                 "ancestors: expected a bit for each of ", nodes, " nodes, in at most ",
                 TreeSettleParams::kMaxWords, " words, got ", a.ancestors.describe());
    SPECRT_CHECK(0 <= a.vocab_size && a.vocab_size <= INT32_MAX,
                 "vocab_size: expected 0 <= V < 2^31, got ", a.vocab_size);
    for (const TensorView* in : {&a.draft_tokens, &a.parents, &a.num_nodes, &a.roots, &a.max_nodes})
        for (const TensorView* out :
             {&a.settled_tokens, &a.settled_parents, &a.depth, &a.ancestors, &a.num_settled})
            expect_apart(*in, *out);
}

TreeSettleParams params_of(const TreeSettleArgs& a) {
    TreeSettleParams p{};
    p.draft_tokens = a.draft_tokens.as<int32_t>();
    p.parents = a.parents.as<int32_t>();
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.roots = a.roots.as<int32_t>();
    p.max_nodes = a.max_nodes.as<int32_t>();
    p.settled_tokens = a.settled_tokens.as<int32_t>();
    p.settled_parents = a.settled_parents.as<int32_t>();
    p.depth = a.depth.as<int32_t>();
    p.ancestors = a.ancestors.as<uint64_t>();
    p.num_settled = a.num_settled.as<int32_t>();
    p.tokens_stride = a.draft_tokens.stride[0];
    p.parents_stride = a.parents.stride[0];
    p.settled_tokens_stride = a.settled_tokens.stride[0];
    p.settled_parents_stride = a.settled_parents.stride[0];
    p.depth_stride = a.depth.stride[0];
    p.ancestors_stride[0] = a.ancestors.stride[0];
    p.ancestors_stride[1] = a.ancestors.stride[1];
    p.batch = static_cast<int32_t>(a.draft_tokens.shape[0]);
    p.given = static_cast<int32_t>(a.draft_tokens.shape[1]);
    p.nodes = static_cast<int32_t>(a.settled_tokens.shape[1]);
    p.words = static_cast<int32_t>(a.ancestors.shape[2]);
    p.vocab = static_cast<int32_t>(a.vocab_size);
    return p;
}

}  // namespace

Launch tree_settle(const TreeSettleArgs& a) {
    check(a);
    const TreeSettleParams p = params_of(a);
    const int device =
        common_device(a.draft_tokens, a.parents, a.num_nodes, a.roots, a.max_nodes,
                      a.settled_tokens, a.settled_parents, a.depth, a.ancestors, a.num_settled);
    if (device != kCpu) return make_cuda_launch(tree_settle_cuda, p, device);
    // A thread has settled 8192 nodes before another one could have started.
    const int64_t parts = 1 + int64_t{p.batch} * p.nodes / 8192;
    return make_launch(tree_settle_part_for(active_isa()), p, parts < p.batch ? parts : p.batch);
}

}  // namespace specrt
