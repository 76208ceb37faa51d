#include "rope_append/rope_append.h"

namespace specrt {

Launch rope_append(const RopeAppendArgs& a) {
    expect_float(a.q);
    expect(a.q, a.q.dtype, "[B, N, Hq, d]", -1, -1, -1, -1);
    const int64_t seqs = a.q.shape[0], rows = a.q.shape[1], dim = a.q.shape[3];
    SPECRT_CHECK(dim > 0 && dim <= 256 && dim % 2 == 0,
                 "q: expected an even head_dim of at most 256, got ", a.q.describe());
    expect_dtype_of(a.q, a.k);
    expect_dtype_of(a.q, a.v);
    expect(a.k, a.q.dtype, "[B, N, Hkv, d]", seqs, rows, -1, dim);
    const int64_t kv_heads = a.k.shape[2];
    expect(a.v, a.q.dtype, "[B, N, Hkv, d]", seqs, rows, kv_heads, dim);
    expect(a.depth, DType::kInt32, "[B, N]", seqs, rows);
    expect(a.cos_sin, DType::kFloat32, "[max_positions, d]", -1, dim);
    expect_contiguous(a.cos_sin);
    SPECRT_CHECK(a.cos_sin.shape[0] > 0, "cos_sin: expected at least one position");
    expect_caches(a.k_cache, a.v_cache, kv_heads, dim);
    RopeAppendParams p{};
    p.q = a.q.data;
    p.k = a.k.data;
    p.v = a.v.data;
    p.depth = a.depth.as<int32_t>();
    p.kv_len = expect_counts(a.kv_len, seqs);
    p.first_node = expect_counts(a.first_node, seqs);
    p.num_nodes = expect_counts(a.num_nodes, seqs);
    p.cos_sin = a.cos_sin.as<float>();
    p.k_cache = a.k_cache.data;
    p.v_cache = a.v_cache.data;
    p.table = page_table(a.block_table, seqs, a.k_cache.shape[0], a.k_cache.shape[1]);
    for (int i = 0; i < 3; ++i) {
        p.q_stride[i] = a.q.stride[i];
        p.k_stride[i] = a.k.stride[i];
        p.v_stride[i] = a.v.stride[i];
    }
    p.depth_stride = a.depth.stride[0];
    p.num_seqs = static_cast<int32_t>(seqs);
    p.num_rows = static_cast<int32_t>(rows);
    p.num_heads = static_cast<int32_t>(a.q.shape[2]);
    p.num_kv_heads = static_cast<int32_t>(kv_heads);
    p.head_dim = static_cast<int32_t>(dim);
    p.max_positions = static_cast<int32_t>(a.cos_sin.shape[0]);
    p.dtype = a.q.dtype;
    p.cache_dtype = a.k_cache.dtype;
    const int device = common_device(a.q, a.k, a.v, a.depth, a.kv_len, a.first_node, a.num_nodes,
                                     a.block_table, a.cos_sin, a.k_cache, a.v_cache);
    if (device != kCpu) return make_cuda_launch(rope_append_cuda, p, device);
    const int64_t parts = 1 + seqs * rows * (a.q.shape[2] + 2 * kv_heads) * dim / 8192;
    return make_launch(rope_append_part_for(active_isa()), p, parts);
}

}  // namespace specrt
