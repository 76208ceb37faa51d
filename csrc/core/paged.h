// Where a sequence's slot s lives: page block_table[s / page_size], row s % page_size.
//
// Nobody can check on the host what counts and tables on a GPU hold, so no kernel trusts them: they
// may hold anything, and no memory but the tensors given is touched. Sums of counts are taken
// modulo 2^32, and then one comparison finds negative ones too.
#pragma once
#include "core/host_device.h"
#include "core/tensor_view.h"

namespace specrt {

struct PageTable {
    const int32_t* pages;  // [B, max_pages]
    int64_t stride;        // between sequences
    int32_t max_pages, page_size;
    int32_t num_pages;  // that the cache has
    int32_t num_slots;  // that a sequence has: kMaxSlots at most
};

// A tree's slots behind the last one can still be numbered in 31 bits.
constexpr int32_t kMaxSlots = INT32_MAX - 1024;

// `index`, or the last one for what is out of range. There must be one.
SPECRT_HD uint32_t clamp_index(uint32_t index, int32_t count) {
    const uint32_t last = static_cast<uint32_t>(count) - 1;
    return index < last ? index : last;
}

// Whether the table has a place for a slot. Others are neither read nor written.
SPECRT_HD bool has_slot(const PageTable& t, uint32_t slot) {
    return slot < static_cast<uint32_t>(t.num_slots);
}

// The row of the cache that a slot of the table is. A page that the cache lacks is its last.
SPECRT_HD int64_t row_of_slot(const PageTable& t, int64_t seq, uint32_t slot) {
    const uint32_t size = static_cast<uint32_t>(t.page_size), index = slot / size;
    const int32_t page = t.pages[seq * t.stride + index];
    return static_cast<int64_t>(clamp_index(static_cast<uint32_t>(page), t.num_pages)) * size +
           (slot - index * size);
}

// For a cache of num_pages pages; without any, no sequence has a slot.
inline PageTable page_table(const TensorView& block_table, int64_t num_seqs, int64_t num_pages,
                            int64_t page_size) {
    expect(block_table, DType::kInt32, "[B, max_pages]", num_seqs, -1);
    SPECRT_CHECK(page_size > 0, "page_size: expected at least one row a page");
    const int64_t max_pages = num_pages > 0 ? block_table.shape[1] : 0;
    const int64_t num_slots = max_pages * page_size;
    return {block_table.as<int32_t>(),
            block_table.stride[0],
            static_cast<int32_t>(max_pages),
            static_cast<int32_t>(page_size),
            static_cast<int32_t>(num_pages < INT32_MAX ? num_pages : INT32_MAX),
            static_cast<int32_t>(num_slots < kMaxSlots ? num_slots : kMaxSlots)};
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
