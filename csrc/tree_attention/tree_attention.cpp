#include "tree_attention/tree_attention.h"

namespace specrt {

namespace {

// What the GPU's kernel asks beyond what every backend does.
void check_for_gpu(const TreeAttentionArgs& a, const TreeAttentionParams& p) {
    SPECRT_CHECK(a.q.dtype != DType::kFloat32, "q: expected bfloat16 or float16 on a GPU, got ",
                 a.q.describe());
    SPECRT_CHECK(p.head_dim == 64 || p.head_dim == 80 || p.head_dim == 96 || p.head_dim == 128,
                 "q: expected a head_dim of 64, 80, 96 or 128 on a GPU, got ", a.q.describe());
    SPECRT_CHECK(a.k_cache.dtype == a.q.dtype, "k_cache: expected q's ", name_of(a.q.dtype),
                 " on a GPU, got ", a.k_cache.describe());
    for (const TensorView* t : {&a.q, &a.out}) {
        const bool is_even = t->stride[0] % 2 == 0 && t->stride[1] % 2 == 0 &&
                             t->stride[2] % 2 == 0 && reinterpret_cast<uintptr_t>(t->data) % 4 == 0;
        SPECRT_CHECK(is_even, t->name, ": expected rows at multiples of 4 bytes on a GPU");
    }
    for (const TensorView* t : {&a.k_cache, &a.v_cache})
        SPECRT_CHECK(reinterpret_cast<uintptr_t>(t->data) % 16 == 0, t->name,
                     ": expected an address that is a multiple of 16 bytes on a GPU");
    SPECRT_CHECK(p.num_nodes_max <= 64 * TreeAttentionParams::kMaxWords,
                 "q: expected at most 128 nodes on a GPU, got ", a.q.describe());
    const int64_t needed = tree_attention_workspace(a.q.device, attention::shape_of(p), p.plan);
    SPECRT_CHECK(a.workspace, "workspace: expected a tensor on a GPU, got None");
    expect(a.workspace, DType::kFloat32, "[floats]", -1);
    SPECRT_CHECK(a.workspace.shape[0] >= needed, "workspace: expected at least ", needed,
                 " floats for this shape, got ", a.workspace.describe());
    SPECRT_CHECK(reinterpret_cast<uintptr_t>(a.workspace.data) % 16 == 0,
                 "workspace: expected an address that is a multiple of 16 bytes");
}

AppendParams append_params(const TreeAttentionArgs& a) {
    AppendParams p{};
    if (!a.k && !a.v && !a.depth && !a.cos_sin) return p;
    for (const TensorView* t : {&a.k, &a.v, &a.depth, &a.cos_sin})
        SPECRT_CHECK(*t, t->name, ": expected a tensor, as k, v, depth and cos_sin go together");
    const int64_t seqs = a.q.shape[0], rows = a.q.shape[1], dim = a.q.shape[3];
    expect(a.k, a.q.dtype, "[B, N, Hkv, d]", seqs, rows, a.k_cache.shape[2], dim);
    expect(a.v, a.q.dtype, "[B, N, Hkv, d]", seqs, rows, a.k_cache.shape[2], dim);
    expect(a.depth, DType::kInt32, "[B, N]", seqs, rows);
    expect(a.cos_sin, DType::kFloat32, "[max_positions, d]", -1, dim);
    expect_contiguous(a.cos_sin);
    SPECRT_CHECK(a.cos_sin.shape[0] > 0, "cos_sin: expected at least one position");
    for (const TensorView* t : {&a.k, &a.v, &a.cos_sin}) {
        bool is_aligned = reinterpret_cast<uintptr_t>(t->data) % 16 == 0;
        for (int i = 0; i + 1 < t->ndim; ++i)
            is_aligned &= t->stride[i] * size_of(t->dtype) % 16 == 0;
        SPECRT_CHECK(is_aligned, t->name, ": expected rows at multiples of 16 bytes");
    }
    p.k = a.k.data;
    p.v = a.v.data;
    p.depth = a.depth.as<int32_t>();
    p.cos_sin = a.cos_sin.as<float>();
    for (int i = 0; i < 3; ++i) p.k_stride[i] = a.k.stride[i], p.v_stride[i] = a.v.stride[i];
    p.depth_stride = a.depth.stride[0];
    p.max_positions = static_cast<int32_t>(a.cos_sin.shape[0]);
    return p;
}

// How many slots of a prefix are seen.
int32_t max_seen(const TreeAttentionArgs& a) {
    SPECRT_CHECK(a.window >= 0, "window: expected at least 1 slot, got ", a.window);
    SPECRT_CHECK(a.num_sinks >= 0, "num_sinks: expected 0 or more slots, got ", a.num_sinks);
    const bool is_all = a.window == 0 || a.window > kMaxSlots || a.num_sinks > kMaxSlots ||
                        a.window + a.num_sinks > kMaxSlots;
    return is_all ? kMaxSlots : static_cast<int32_t>(a.window + a.num_sinks);
}

}  // namespace

void expect_plan(const PlanChoice& plan) {
    SPECRT_CHECK(plan.num_warps == 0 || plan.num_warps == 4 || plan.num_warps == 8,
                 "plan: expected num_warps of 4 or 8, got ", plan.num_warps);
    SPECRT_CHECK(plan.blocks_per_sm >= 0 && plan.blocks_per_sm <= 16,
                 "plan: expected blocks_per_sm from 1 to 16, got ", plan.blocks_per_sm);
}

int32_t clamped_window(int64_t sliding_window) {
    SPECRT_CHECK(sliding_window >= 0, "sliding_window: expected at least 1 position, got ",
                 sliding_window);
    const bool is_all = sliding_window == 0 || sliding_window > kMaxSlots;
    return is_all ? kMaxSlots : static_cast<int32_t>(sliding_window);
}

Launch tree_attention(const TreeAttentionArgs& a) {
    const int device =
        common_device(a.q, a.k_cache, a.v_cache, a.block_table, a.kv_len, a.first_node, a.num_nodes,
                      a.ancestors, a.out, a.workspace, a.k, a.v, a.depth, a.cos_sin, a.is_open);
    expect_plan(a.plan);
    expect_float(a.q);
    expect(a.q, a.q.dtype, "[B, N, Hq, d]", -1, -1, -1, -1);
    const int64_t seqs = a.q.shape[0], nodes = a.q.shape[1], heads = a.q.shape[2];
    const int64_t dim = a.q.shape[3];
    SPECRT_CHECK(dim > 0 && dim <= 256 && dim % 16 == 0,
                 "q: expected a head_dim that is a multiple of 16 up to 256, got ", a.q.describe());
    SPECRT_CHECK(a.k_cache.ndim == 4, "k_cache: expected [P, page_size, Hkv, d], got ",
                 a.k_cache.describe());
    const int64_t kv_heads = a.k_cache.shape[2];
    SPECRT_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q: expected a multiple of ", kv_heads,
                 " heads, got ", a.q.describe());
    expect_caches(a.k_cache, a.v_cache, kv_heads, dim);
    expect(a.ancestors, DType::kInt64, "[B, N, W]", seqs, nodes, -1);
    SPECRT_CHECK(a.ancestors.shape[2] <= TreeAttentionParams::kMaxWords,
                 "ancestors: expected at most 2 words (128 nodes), got ", a.ancestors.describe());
    expect(a.out, a.q.dtype, "[B, N, Hq, d]", seqs, nodes, heads, dim);
    TreeAttentionParams p{};
    p.q = a.q.data;
    p.k_cache = a.k_cache.data;
    p.v_cache = a.v_cache.data;
    p.kv_len = expect_counts(a.kv_len, seqs);
    p.first_node = expect_counts(a.first_node, seqs);
    p.num_nodes = expect_counts(a.num_nodes, seqs);
    p.ancestors = a.ancestors.as<uint64_t>();
    p.out = a.out.data;
    p.workspace = a.workspace.data;
    p.table = page_table(a.block_table, seqs, a.k_cache.shape[0], a.k_cache.shape[1]);
    for (int i = 0; i < 3; ++i) {
        p.q_stride[i] = a.q.stride[i];
        p.out_stride[i] = a.out.stride[i];
    }
    p.ancestors_stride[0] = a.ancestors.stride[0];
    p.ancestors_stride[1] = a.ancestors.stride[1];
    p.num_seqs = static_cast<int32_t>(seqs);
    p.num_nodes_max = static_cast<int32_t>(nodes);
    p.num_kv_heads = static_cast<int32_t>(kv_heads);
    p.group = static_cast<int32_t>(heads / kv_heads);
    p.head_dim = static_cast<int32_t>(dim);
    p.num_words = static_cast<int32_t>(a.ancestors.shape[2]);
    p.scale = a.scale;
    p.plan = a.plan;
    p.max_seen = max_seen(a);
    p.num_sinks = static_cast<int32_t>(a.num_sinks < p.max_seen ? a.num_sinks : p.max_seen);
    if (a.is_open) p.is_open = expect_counts(a.is_open, seqs);
    p.sliding_window = clamped_window(a.sliding_window);
    SPECRT_CHECK(a.sliding_window == 0 || a.window == 0,
                 "sliding_window: expected none beside a window, got ", a.sliding_window);
    SPECRT_CHECK(a.cap >= 0.0f && a.cap <= 3e38f, "cap: expected a number above 0, got ", a.cap);
    p.cap = a.cap;
    p.q_dtype = a.q.dtype;
    p.cache_dtype = a.k_cache.dtype;
    SPECRT_CHECK(p.table.num_slots > 0 || seqs * nodes == 0,
                 "block_table: expected at least one page a sequence, and a cache that has pages");
    SPECRT_CHECK(p.num_words > 0 || nodes == 0, "ancestors: expected at least 1 word, got ",
                 a.ancestors.describe());
    if (device != kCpu) {
        check_for_gpu(a, p);
        p.append = append_params(a);
        return make_cuda_launch(tree_attention_cuda, p, device);
    }
    SPECRT_CHECK(!a.k, "k: expected None on the CPU, where rope_append comes first");
    // Lengths are not known when a launch is recorded: this supposes a prefix of some 128 keys.
    const int64_t parts = 1 + seqs * nodes * heads * dim / 128;
    return make_launch(tree_attention_part_for(active_isa()), p, parts);
}

}  // namespace specrt
