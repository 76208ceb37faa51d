#include "tree_build/tree_build.h"

#include "core/tile_maxima.h"

namespace specrt {
namespace {

int32_t narrow(int64_t size) {
    return static_cast<int32_t>(size);
}

int64_t top_k_of(const TreeExpandArgs& a) {
    expect(a.frontier_tokens, DType::kInt32, "[B, K]", -1, -1);
    const int64_t top_k = a.frontier_tokens.shape[1], rows = a.logits.shape[2];
    SPECRT_CHECK(1 <= top_k && top_k <= kMaxTopK && top_k <= rows,
                 "frontier_tokens: expected 1 <= K <= ", rows < kMaxTopK ? rows : kMaxTopK,
                 ", got ", a.frontier_tokens.describe());
    return top_k;
}

void check_noise(const TreeExpandArgs& a, int64_t batch) {
    if (!a.sampling) {
        SPECRT_CHECK(!a.position, "position: expected None, as sampling is None");
        return;
    }
    SPECRT_CHECK(static_cast<bool>(a.position),
                 "position: expected a tensor, as sampling is given");
    expect(a.sampling, DType::kInt64, "[B, 8]", batch, kSamplingWords);
    expect_contiguous(a.sampling);
    expect(a.position, DType::kInt32, "[B]", batch);
    // Also false for NaN; the upper end keeps w / tau from vanishing.
    SPECRT_CHECK(a.noise_scale_temperature > 0.0f && a.noise_scale_temperature < 1e30f,
                 "noise_scale_temperature: expected a number > 0, got ", a.noise_scale_temperature);
}

void check_pool(const TensorView& tokens, const TensorView& parents, const TensorView& scores,
                int64_t batch, int64_t needed) {
    expect(tokens, DType::kInt32, "[B, C]", batch, -1);
    const int64_t size = tokens.shape[1];
    expect(parents, DType::kInt32, "[B, C]", batch, size);
    expect(scores, DType::kFloat32, "[B, C]", batch, size);
    for (const TensorView* t : {&tokens, &parents, &scores}) expect_contiguous(*t);
    SPECRT_CHECK(needed <= size && size <= INT32_MAX, tokens.name, ": expected at least ", needed,
                 " candidates, got ", tokens.describe());
}

void check_frontiers(const TreeExpandArgs& a, int64_t batch, int64_t width, int64_t top_k) {
    expect(a.scores, DType::kFloat32, "[B, F]", batch, width);
    expect(a.candidates, DType::kInt32, "[B, F]", batch, width);
    expect(a.ancestors, DType::kInt64, "[B, F, W]", batch, width, -1);
    const int64_t words = a.ancestors.shape[2];
    expect(a.frontier_scores, DType::kFloat32, "[B, K]", batch, top_k);
    for (const TensorView* t : {&a.frontier_tokens, &a.frontier_candidates, &a.frontier_source})
        expect(*t, DType::kInt32, "[B, K]", batch, top_k);
    expect(a.frontier_ancestors, DType::kInt64, "[B, K, W]", batch, top_k, words);
    for (const TensorView* t :
         {&a.scores, &a.candidates, &a.ancestors, &a.frontier_tokens, &a.frontier_scores,
          &a.frontier_candidates, &a.frontier_source, &a.frontier_ancestors})
        expect_contiguous(*t);
    SPECRT_CHECK(a.frontier_scores.data != a.scores.data &&
                     a.frontier_candidates.data != a.candidates.data &&
                     a.frontier_ancestors.data != a.ancestors.data,
                 "frontier_scores, frontier_candidates, frontier_ancestors: expected other tensors "
                 "than the frontier that is read");
}

int64_t pool_end(int64_t level, int64_t top_k) {
    return top_k + level * top_k * top_k;
}

TreeExpandParams params_of(const TreeExpandArgs& a, int64_t top_k) {
    TreeExpandParams p{};
    p.logits = a.logits.as<float>();
    p.scores = a.scores.as<float>();
    p.candidates = a.candidates.as<int32_t>();
    p.ancestors = a.ancestors.as<int64_t>();
    p.token_map = a.token_map.as<int32_t>();
    p.sampling = a.sampling.as<SamplingRow>();
    p.position = a.position.as<int32_t>();
    p.is_open = a.is_open.as<int32_t>();
    p.noise_scale_temperature = a.noise_scale_temperature;
    p.pool_tokens = a.pool_tokens.as<int32_t>();
    p.pool_parents = a.pool_parents.as<int32_t>();
    p.pool_scores = a.pool_scores.as<float>();
    p.frontier_tokens = a.frontier_tokens.as<int32_t>();
    p.frontier_scores = a.frontier_scores.as<float>();
    p.frontier_candidates = a.frontier_candidates.as<int32_t>();
    p.frontier_source = a.frontier_source.as<int32_t>();
    p.frontier_ancestors = a.frontier_ancestors.as<int64_t>();
    p.level_score = a.level_score.as<float>();
    p.keys = a.keys.as<uint64_t>();
    p.masses = a.masses.as<float>();
    p.workspace = a.workspace.as<float>();
    p.workspace_size = a.workspace.shape[0];
    p.logits_stride[0] = a.logits.stride[0];
    p.logits_stride[1] = a.logits.stride[1];
    p.batch = narrow(a.logits.shape[0]);
    p.width = narrow(a.logits.shape[1]);
    p.rows = narrow(a.logits.shape[2]);
    p.top_k = narrow(top_k);
    p.pool_size = narrow(a.pool_tokens.shape[1]);
    p.words = narrow(a.ancestors.shape[2]);
    p.level = narrow(a.level);
    return p;
}

int device_of(const TreeExpandArgs& a) {
    return common_device(a.logits, a.scores, a.candidates, a.ancestors, a.token_map, a.sampling,
                         a.position, a.workspace, a.pool_tokens, a.pool_parents, a.pool_scores,
                         a.frontier_tokens, a.frontier_scores, a.frontier_candidates,
                         a.frontier_source, a.frontier_ancestors, a.is_open, a.level_score, a.keys,
                         a.masses);
}

void check_maxima(const TreeExpandArgs& a) {
    const int64_t tiles = num_token_tiles(a.logits.shape[2]);
    const int64_t rows = a.logits.shape[0] * a.logits.shape[1];
    expect(a.keys, DType::kInt64, "[B * F, ceil(R / 64)]", rows, tiles);
    expect(a.masses, DType::kFloat32, "[B * F, ceil(R / 64)]", rows, tiles);
    expect_contiguous(a.keys);
    expect_contiguous(a.masses);
}

TreeExpand launch_on_gpu(const TreeExpandArgs& a, const TreeExpandParams& p, int device) {
    expect(a.workspace, DType::kFloat32, "[floats]", -1);
    const int64_t needed = tree_expand_gpu_workspace(p.batch, p.width, p.rows, p.top_k);
    SPECRT_CHECK(a.workspace.shape[0] >= needed, "workspace: expected at least ", needed,
                 " floats for this shape, got ", a.workspace.describe());
    expect_aligned(a.workspace, sizeof(uint64_t));
    if (a.keys) check_maxima(a);
    return {make_cuda_launch(tree_expand_cuda, p, device), Launch{}};
}

TreeExpand launch_on_cpu(const TreeExpandArgs& a, const TreeExpandParams& p) {
    SPECRT_CHECK(!a.keys, "maxima: expected None on the CPU");
    expect(a.workspace, DType::kFloat32, "[parts, size]", -1, tree_expand_workspace(p.rows));
    expect_contiguous(a.workspace);
    expect_aligned(a.workspace, sizeof(uint64_t));
    SPECRT_CHECK(a.workspace.shape[0] >= 1, "workspace: expected at least one part, got ",
                 a.workspace.describe());
    // A part owns one workspace row. One thread is done with 16k logits before a second could have
    // started.
    const int64_t batch = p.batch, rows = batch * p.width;
    int64_t parts = rows;
    if (parts > 1 + rows * p.rows / 16384) parts = 1 + rows * p.rows / 16384;
    if (parts > a.workspace.shape[0]) parts = a.workspace.shape[0];
    const int64_t frontier_parts = 1 + rows * p.top_k / 8192;
    const Isa isa = active_isa();
    return {make_launch(tree_expand_children_part_for(isa), p, parts),
            make_launch(tree_expand_frontier_part_for(isa), p,
                        frontier_parts < batch ? frontier_parts : batch)};
}

}  // namespace

TreeExpand tree_expand(const TreeExpandArgs& a) {
    expect(a.logits, DType::kFloat32, "[B, F, R]", -1, -1, -1);
    const int64_t batch = a.logits.shape[0], width = a.logits.shape[1], rows = a.logits.shape[2];
    const int64_t top_k = top_k_of(a);
    SPECRT_CHECK(0 <= a.level && a.level < 65536, "level: expected 0..65535, got ", a.level);
    // A chain has one node at every level.
    SPECRT_CHECK(width == 1 || (a.level > 0 && width == top_k), "logits: expected F = 1",
                 a.level > 0 ? " or " + std::to_string(top_k) : "", " at level ", a.level, ", got ",
                 a.logits.describe());
    check_frontiers(a, batch, width, top_k);
    check_pool(a.pool_tokens, a.pool_parents, a.pool_scores, batch, pool_end(a.level, top_k));
    check_noise(a, batch);
    if (a.token_map) expect(a.token_map, DType::kInt32, "[R]", rows);
    if (a.is_open) expect(a.is_open, DType::kInt32, "[B]", batch);
    if (a.level_score) expect(a.level_score, DType::kFloat32, "[B]", batch);
    const int device = device_of(a);
    const TreeExpandParams p = params_of(a, top_k);
    return device == kCpu ? launch_on_cpu(a, p) : launch_on_gpu(a, p, device);
}

Launch tree_rerank(const TreeRerankArgs& a) {
    expect(a.draft_tokens, DType::kInt32, "[B, N]", -1, -1);
    const int64_t batch = a.draft_tokens.shape[0], nodes = a.draft_tokens.shape[1];
    SPECRT_CHECK(1 <= nodes && nodes <= kMaxNodes, "draft_tokens: expected 1 <= N <= ", kMaxNodes,
                 ", got ", a.draft_tokens.describe());
    SPECRT_CHECK(a.num_candidates >= 0, "num_candidates: expected >= 0, got ", a.num_candidates);
    check_pool(a.pool_tokens, a.pool_parents, a.pool_scores, batch, a.num_candidates);
    expect(a.roots, DType::kInt32, "[B]", batch);
    expect(a.parents, DType::kInt32, "[B, N]", batch, nodes);
    expect(a.num_nodes, DType::kInt32, "[B]", batch);
    expect(a.node_scores, DType::kFloat32, "[B, N]", batch, nodes);
    for (const TensorView* t : {&a.draft_tokens, &a.parents, &a.node_scores}) expect_contiguous(*t);

    TreeRerankParams p{};
    p.pool_tokens = a.pool_tokens.as<int32_t>();
    p.pool_parents = a.pool_parents.as<int32_t>();
    p.pool_scores = a.pool_scores.as<float>();
    p.roots = a.roots.as<int32_t>();
    p.draft_tokens = a.draft_tokens.as<int32_t>();
    p.parents = a.parents.as<int32_t>();
    p.num_nodes = a.num_nodes.as<int32_t>();
    p.node_scores = a.node_scores.as<float>();
    p.batch = narrow(batch);
    p.nodes = narrow(nodes);
    p.pool_size = narrow(a.pool_tokens.shape[1]);
    p.num_candidates = narrow(a.num_candidates);
    const int device = common_device(a.draft_tokens, a.pool_tokens, a.pool_parents, a.pool_scores,
                                     a.roots, a.parents, a.num_nodes, a.node_scores);
    if (device != kCpu) return make_cuda_launch(tree_rerank_cuda, p, device);
    const int64_t parts = 1 + batch * a.num_candidates / 8192;
    return make_launch(tree_rerank_part_for(active_isa()), p, parts < batch ? parts : batch);
}

}  // namespace specrt
