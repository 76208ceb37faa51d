#include "tree_accept/tree_accept.h"

#include <algorithm>

#include "core/tile_maxima.h"
#include "tree_accept/workspace.h"

namespace specrt {
namespace {

struct Sizes {
    int64_t batch, nodes, vocab;
};

Sizes sizes_of(const TreeAcceptArgs& a) {
    if (!a.logit_rows) {
        expect(a.logits, DType::kFloat32, "[B, N, V]", -1, -1, -1);
        return {a.logits.shape[0], a.logits.shape[1], a.logits.shape[2]};
    }
    expect(a.logits, DType::kFloat32, "[R, V]", -1, -1);
    expect(a.logit_rows, DType::kInt32, "[B, N]", -1, -1);
    expect_contiguous(a.logit_rows);
    return {a.logit_rows.shape[0], a.logit_rows.shape[1], a.logits.shape[1]};
}

void check_shapes(const TreeAcceptArgs& a) {
    const Sizes size = sizes_of(a);
    const int64_t batch = size.batch, nodes = size.nodes, vocab = size.vocab;
    SPECRT_CHECK(nodes >= 1 && vocab >= 1, "logits: expected at least one node and one token, got ",
                 a.logits.describe());
    for (const TensorView* t : {&a.draft_tokens, &a.parents})
        expect(*t, DType::kInt32, "[B, N]", batch, nodes);
    expect(a.num_nodes, DType::kInt32, "[B]", batch);
    expect(a.sampling, DType::kInt64, "[B, 8]", batch, kSamplingWords);
    expect(a.history, DType::kInt32, "[B, T]", batch, -1);
    expect(a.history_len, DType::kInt32, "[B]", batch);
    expect(a.path, DType::kInt32, "[B, N]", batch, nodes);
    expect(a.tokens, DType::kInt32, "[B, N]", batch, nodes);
    expect(a.accept_length, DType::kInt32, "[B]", batch);
    if (a.draft_probs) expect(a.draft_probs, DType::kFloat32, "[B, N, V]", batch, nodes, vocab);
    if (a.logprobs) expect(a.logprobs, DType::kFloat32, "[B, N]", batch, nodes);
    SPECRT_CHECK(!a.logit_rows == !a.next_node,
                 "next_node: expected with logit_rows, and only with them, got ",
                 a.next_node.describe());
    if (a.next_node) {
        expect(a.next_node, DType::kInt32, "[B]", batch);
        expect_contiguous(a.next_node);
    }
    SPECRT_CHECK(vocab < (int64_t{1} << 31) / nodes, "logits: expected a vocabulary below 2^31 / ",
                 nodes, ", got ", a.logits.describe());
    if (a.bias_ids) {
        expect(a.bias_ids, DType::kInt32, "[K]", -1);
        expect(a.bias_values, DType::kFloat32, "[K]", a.bias_ids.shape[0]);
    }
    for (const TensorView* t : {&a.draft_tokens, &a.parents, &a.num_nodes, &a.sampling,
                                &a.history_len, &a.path, &a.tokens, &a.accept_length})
        expect_contiguous(*t);
    if (a.logprobs) expect_contiguous(a.logprobs);
}

int64_t num_biases(const TreeAcceptArgs& a) {
    return a.bias_ids ? a.bias_ids.shape[0] : 0;
}

// Reads the sampling rows: on a CPU alone.
void check_for_cpu(const TreeAcceptArgs& a) {
    if (a.workspace) {
        const int64_t size = tree_accept_workspace(sizes_of(a).vocab);
        expect(a.workspace, DType::kFloat32, "[parts, size]", -1, size);
        expect_contiguous(a.workspace);
        expect_aligned(a.workspace, sizeof(uint64_t));
    }
    const auto* rows = a.sampling.as<SamplingRow>();
    bool needs_workspace = false;
    for (int64_t b = 0; b < a.sampling.shape[0]; ++b) {
        needs_workspace = needs_workspace || !is_plain_greedy(rows[b]);
        SPECRT_CHECK(0 <= rows[b].bias_begin && rows[b].bias_begin <= rows[b].bias_end &&
                         rows[b].bias_end <= num_biases(a),
                     "sampling: row ", b, " points outside the packed logit_bias");
    }
    SPECRT_CHECK(!needs_workspace || (a.workspace && a.workspace.shape[0] >= 1),
                 "workspace: needed unless every sequence is greedy without bias and penalties");
}

void check_for_gpu(const TreeAcceptArgs& a) {
    const int64_t batch = a.logits.shape[0], nodes = a.logits.shape[1], vocab = a.logits.shape[2];
    SPECRT_CHECK(nodes <= kMostAcceptNodes, "logits: expected at most ", kMostAcceptNodes,
                 " nodes on a GPU, got ", a.logits.describe());
    const int64_t blocks = batch * nodes * split_rows(batch * nodes, vocab).num_slices;
    SPECRT_CHECK(blocks < int64_t{1} << 31, "logits: too many rows for one launch, got ",
                 a.logits.describe());
    const int64_t size = tree_accept_gpu_workspace(batch, nodes, vocab, !!a.draft_probs);
    SPECRT_CHECK(a.workspace, "workspace: needed on a GPU, [", size, "] float32");
    expect(a.workspace, DType::kFloat32, "[size]", -1);
    SPECRT_CHECK(a.workspace.shape[0] >= size, "workspace: expected at least ", size,
                 " elements, got ", a.workspace.describe());
    expect_aligned(a.workspace, 16);
    if (!a.maxima) return;
    expect(a.maxima, DType::kInt64, "[B * N, ceil(V / 64)]", batch * nodes, num_token_tiles(vocab));
    expect_contiguous(a.maxima);
}

TreeAcceptParams params_of(const TreeAcceptArgs& a) {
    const Sizes size = sizes_of(a);
    return {a.draft_tokens.as<int32_t>(),
            a.parents.as<int32_t>(),
            a.num_nodes.as<int32_t>(),
            a.draft_probs.as<float>(),
            a.logits.as<float>(),
            a.sampling.as<SamplingRow>(),
            a.bias_ids.as<int32_t>(),
            a.bias_values.as<float>(),
            a.history.as<int32_t>(),
            a.history_len.as<int32_t>(),
            a.path.as<int32_t>(),
            a.accept_length.as<int32_t>(),
            a.tokens.as<int32_t>(),
            a.logprobs.as<float>(),
            a.workspace.as<float>(),
            a.maxima.as<uint64_t>(),
            {a.logits.stride[0], a.logits.stride[a.logit_rows ? 0 : 1]},
            {a.draft_probs.stride[0], a.draft_probs.stride[1]},
            a.history.stride[0],
            size.batch,
            size.nodes,
            size.vocab,
            size.nodes,
            a.history.shape[1],
            num_biases(a),
            a.logit_rows.as<int32_t>(),
            a.next_node.as<int32_t>(),
            a.logits.shape[0],
            WalkStage::kBegin};
}

// Nodes of the longest path, as the trees are; a walk takes more launches' work alone.
int64_t num_levels(const TreeAcceptParams& p) {
    constexpr int64_t kMost = 8;
    std::vector<int64_t> level(static_cast<size_t>(p.nodes), 1);
    int64_t deepest = 1;
    for (int64_t i = 0; i < p.batch; ++i)
        for (int64_t j = 1; j < p.nodes; ++j) {
            const int64_t parent = p.parents[i * p.nodes + j];
            const bool is_below = 0 <= parent && parent < j && j < p.num_nodes[i];
            level[static_cast<size_t>(j)] = is_below ? 1 + level[static_cast<size_t>(parent)] : 1;
            deepest = std::max(deepest, level[static_cast<size_t>(j)]);
        }
    return std::min(deepest, kMost);
}

// Passes over a row that all threads make, at most.
int64_t num_shared_passes(const TreeAcceptParams& p) {
    int64_t most = 0;
    for (int64_t i = 0; i < p.batch; ++i) {
        const SamplingRow& s = p.sampling[i];
        if (s.temperature == 0.0f || has_top_k(s, p.vocab)) continue;
        most = std::max(most, int64_t{has_top_p(s) ? 3 : has_min_p(s) ? 0 : 1});
    }
    return most;
}

// A part is whole sequences, and owns one scratch. One thread is done with 16k logits before a
// second could have started.
Launch whole_walks(const TreeAcceptParams& p, int64_t num_scratches) {
    int64_t parts = std::min(p.batch, 1 + p.batch * p.vocab / 16384);
    if (p.workspace) parts = std::min(parts, num_scratches);
    return make_launch(tree_accept_part_for(active_isa()), p, parts);
}

// Steps of all walks, with passes over rows between them. Walks that end sooner leave launches
// with nothing to do; those that would need more do the rest in the last one.
std::vector<Launch> shared_walks(TreeAcceptParams p, int64_t num_passes) {
    const Isa isa = active_isa();
    std::vector<Launch> launches{make_launch(tree_accept_step_part_for(isa), p, p.batch)};
    const int64_t count = num_passes * num_levels(p);
    for (int64_t i = 1; i <= count; ++i) {
        p.stage = i < count ? WalkStage::kGoOn : WalkStage::kEnd;
        launches.push_back(
            make_launch(tree_accept_slice_part_for(isa), p, p.batch * num_row_slices(p.vocab)));
        launches.push_back(make_launch(tree_accept_step_part_for(isa), p, p.batch));
    }
    return launches;
}

}  // namespace

int64_t tree_accept_gpu_workspace(int64_t batch, int64_t nodes, int64_t vocab,
                                  bool has_draft_probs) {
    return (accept_workspace(nullptr, batch, nodes, vocab, has_draft_probs).num_bytes + 3) / 4;
}

std::vector<Launch> tree_accept(const TreeAcceptArgs& a) {
    check_shapes(a);
    const int device =
        common_device(a.logits, a.draft_tokens, a.parents, a.num_nodes, a.draft_probs, a.sampling,
                      a.bias_ids, a.bias_values, a.history, a.history_len, a.workspace, a.path,
                      a.accept_length, a.tokens, a.logprobs, a.maxima, a.logit_rows, a.next_node);
    if (device != kCpu) {
        SPECRT_CHECK(!a.logit_rows,
                     "logit_rows: expected None on a GPU, which draws for all nodes");
        check_for_gpu(a);
        return {make_cuda_launch(tree_accept_cuda, params_of(a), device)};
    }
    SPECRT_CHECK(!a.maxima, "maxima: expected None on the CPU, which reads what it walks over");
    check_for_cpu(a);
    const TreeAcceptParams p = params_of(a);
    const int64_t num_scratches = a.workspace ? a.workspace.shape[0] : 0;
    if (p.vocab >= kLeastSharedVocab && num_scratches >= p.batch)
        if (const int64_t num_passes = num_shared_passes(p)) return shared_walks(p, num_passes);
    return {whole_walks(p, num_scratches)};
}

Launch processed_logits(const TreeAcceptArgs& a, const TensorView& out) {
    SPECRT_CHECK(a.logits.device == kCpu, "logits: expected a CPU tensor, got one on ",
                 name_of_device(a.logits.device));
    tree_accept(a);  // for its checks
    SPECRT_CHECK(a.workspace, "workspace: needed");
    TreeAcceptParams p = params_of(a);
    expect(out, DType::kFloat32, "[B, V]", p.batch, p.vocab);
    expect_contiguous(out);
    p.logprobs = out.as<float>();
    return make_launch(processed_logits_part_for(active_isa()), p,
                       std::min(p.batch, a.workspace.shape[0]));
}

Launch exponentials(const TensorView& x, const TensorView& exps, const TensorView& masses) {
    expect(x, DType::kFloat32, "[n]", -1);
    expect(exps, DType::kFloat32, "[n]", x.shape[0]);
    expect(masses, DType::kInt64, "[n]", x.shape[0]);
    const ExponentialsParams p{x.as<float>(), exps.as<float>(), masses.as<uint64_t>(), x.shape[0]};
    return make_launch(exponentials_part_for(active_isa()), p, 1);
}

}  // namespace specrt
