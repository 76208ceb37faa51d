#include "token_recycle/token_recycle.h"

namespace specrt {
namespace {

int32_t narrow(int64_t size) {
    return static_cast<int32_t>(size);
}

void check_tables(const TensorView& tables) {
    expect(tables, DType::kInt32, "[S, V, R]", -1, -1, -1);
    expect_contiguous(tables);
    const int64_t slots = tables.shape[0], vocab = tables.shape[1], ranks = tables.shape[2];
    SPECRT_CHECK(1 <= slots && slots <= INT32_MAX && 1 <= vocab && vocab <= INT32_MAX,
                 "tables: expected 1 <= S, V < 2^31, got ", tables.describe());
    SPECRT_CHECK(1 <= ranks && ranks <= kMaxRanks, "tables: expected 1 <= R <= ", kMaxRanks,
                 ", got ", tables.describe());
}

int64_t nodes_of(const TensorView& draft_tokens) {
    expect(draft_tokens, DType::kInt32, "[B, N]", -1, -1);
    const int64_t nodes = draft_tokens.shape[1];
    SPECRT_CHECK(1 <= nodes && nodes <= kMaxRecycledNodes,
                 "draft_tokens: expected 1 <= N <= ", kMaxRecycledNodes, ", got ",
                 draft_tokens.describe());
    return nodes;
}

void check_learn(const RecycleLearnArgs& a) {
    check_tables(a.tables);
    const int64_t nodes = nodes_of(a.draft_tokens), batch = a.draft_tokens.shape[0];
    expect(a.logits, DType::kFloat32, "[B, N, V]", batch, nodes, a.tables.shape[1]);
    expect(a.path, DType::kInt32, "[B, P]", batch, -1);
    SPECRT_CHECK(a.path.shape[1] <= INT32_MAX, "path: expected P < 2^31, got ", a.path.describe());
    for (const TensorView* t : {&a.num_nodes, &a.accept_length, &a.slots})
        expect(*t, DType::kInt32, "[B]", batch);
    expect(a.is_own, DType::kInt32, "[S, V]", a.tables.shape[0], a.tables.shape[1]);
    expect_contiguous(a.is_own);
}

RecycleLearnParams learn_params(const RecycleLearnArgs& a) {
    RecycleLearnParams p{};
    p.logits = a.logits.as<float>();
    p.draft_tokens = a.draft_tokens.as<int32_t>();
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.path = a.path.as<int32_t>();
    p.accept_length = a.accept_length.as<int32_t>();
    p.slots = a.slots.as<int32_t>();
    p.tables = a.tables.as<int32_t>();
    p.is_own = a.is_own.as<int32_t>();
    p.logits_stride[0] = a.logits.stride[0];
    p.logits_stride[1] = a.logits.stride[1];
    p.tokens_stride = a.draft_tokens.stride[0];
    p.path_stride = a.path.stride[0];
    p.batch = narrow(a.draft_tokens.shape[0]);
    p.nodes = narrow(a.draft_tokens.shape[1]);
    p.vocab = narrow(a.tables.shape[1]);
    p.path_size = narrow(a.path.shape[1]);
    p.num_slots = narrow(a.tables.shape[0]);
    p.num_ranks = narrow(a.tables.shape[2]);
    p.num_kept = p.num_ranks < p.vocab ? p.num_ranks : p.vocab;
    return p;
}

Launch learn_on_gpu(const RecycleLearnArgs& a, RecycleLearnParams p, int device) {
    SPECRT_CHECK(static_cast<bool>(a.workspace), "workspace: expected a tensor on a GPU");
    expect(a.workspace, DType::kFloat32, "[floats]", -1);
    expect_aligned(a.workspace, sizeof(uint64_t));
    const int64_t rows = int64_t{p.batch} * p.nodes;
    const int64_t needed = recycle_learn_workspace(rows, p.vocab, p.num_ranks);
    SPECRT_CHECK(a.workspace.shape[0] >= needed, "workspace: expected at least ", needed,
                 " floats for this shape, got ", a.workspace.describe());
    SPECRT_CHECK(rows * recycle_slices(p.vocab) <= INT32_MAX,
                 "logits: expected fewer than 2^31 slices, got ", a.logits.describe());
    p.workspace = a.workspace.as<uint32_t>();
    p.workspace_size = a.workspace.shape[0];
    return make_cuda_launch(recycle_learn_cuda, p, device);
}

}  // namespace

Launch recycle_propose(const RecycleProposeArgs& a) {
    check_tables(a.tables);
    const int64_t nodes = nodes_of(a.draft_tokens), batch = a.draft_tokens.shape[0];
    for (const TensorView* t : {&a.slots, &a.roots}) expect(*t, DType::kInt32, "[B]", batch);
    for (const TensorView* t : {&a.parents, &a.ranks}) expect(*t, DType::kInt32, "[N]", nodes);

    RecycleProposeParams p{};
    p.tables = a.tables.as<int32_t>();
    p.slots = a.slots.as<int32_t>();
    p.roots = a.roots.as<int32_t>();
    p.parents = a.parents.as<int32_t>();
    p.ranks = a.ranks.as<int32_t>();
    p.draft_tokens = a.draft_tokens.as<int32_t>();
    p.tokens_stride = a.draft_tokens.stride[0];
    p.batch = narrow(batch);
    p.num_slots = narrow(a.tables.shape[0]);
    p.vocab = narrow(a.tables.shape[1]);
    p.num_ranks = narrow(a.tables.shape[2]);
    p.nodes = narrow(nodes);
    const int device =
        common_device(a.tables, a.slots, a.roots, a.parents, a.ranks, a.draft_tokens);
    if (device != kCpu) return make_cuda_launch(recycle_propose_cuda, p, device);
    const int64_t parts = 1 + batch * nodes / 8192;
    return make_launch(recycle_propose_part_for(active_isa()), p, parts < batch ? parts : batch);
}

Launch recycle_learn(const RecycleLearnArgs& a) {
    check_learn(a);
    const RecycleLearnParams p = learn_params(a);
    const int device = common_device(a.logits, a.draft_tokens, a.num_nodes, a.path, a.accept_length,
                                     a.slots, a.tables, a.is_own, a.workspace);
    if (device != kCpu) return learn_on_gpu(a, p, device);
    // A thread has read 16k logits before another one could have started.
    const int64_t parts = 1 + int64_t{p.batch} * p.nodes * p.vocab / 16384;
    return make_launch(recycle_learn_part_for(active_isa()), p, parts < p.batch ? parts : p.batch);
}

}  // namespace specrt
