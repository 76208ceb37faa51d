// Where a sequence's slot s lives: page block_table[s / page_size], row s % page_size.
#pragma once
#include "core/tensor_view.h"

namespace specrt {

struct PageTable {
    const int32_t* pages;  // [B, max_pages]
    int64_t stride;        // between sequences
    int32_t max_pages, page_size;
};

inline PageTable page_table(const TensorView& block_table, int64_t num_seqs, int64_t page_size) {
    expect(block_table, DType::kInt32, "[B, max_pages]", num_seqs, -1);
    SPECRT_CHECK(page_size > 0, "page_size: expected at least one row a page");
    return {block_table.as<int32_t>(), block_table.stride[0],
            static_cast<int32_t>(block_table.shape[1]), static_cast<int32_t>(page_size)};
}

// One count a sequence.
inline const int32_t* expect_counts(const TensorView& t, int64_t num_seqs) {
    expect(t, DType::kInt32, "[B]", num_seqs);
    return t.as<int32_t>();
}

// k_cache and v_cache, [P, page_size, Hkv, d], of one layer.
inline void expect_caches(const TensorView& k, const TensorView& v, int64_t num_heads,
                          int64_t head_dim) {
    expect_float(k);
    expect(k, k.dtype, "[P, page_size, Hkv, d]", -1, -1, num_heads, head_dim);
    expect(v, k.dtype, "[P, page_size, Hkv, d]", k.shape[0], k.shape[1], num_heads, head_dim);
    expect_contiguous(k);
    expect_contiguous(v);
}

}  // namespace specrt
