// Plain loops: each element is a product, a product and a sum, which the compiler may vectorise but
// (-ffp-contract=off) not fuse, so the bits are those of the Hugging Face expression everywhere.
#include "core/simd.h"
#include "rope_append/rope_append.h"

namespace specrt::SPECRT_ISA {
namespace {

// "rotate_half": element i pairs with i + d / 2. `out` may be `x`.
void rotate(const float* x, const float* cos_sin, float* out, int head_dim) {
    const int half = head_dim / 2;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    float rotated[256];
    for (int i = 0; i < half; ++i) rotated[i] = x[i] * cosine[i] - x[i + half] * sine[i];
    for (int i = 0; i < half; ++i) rotated[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
    std::memcpy(out, rotated, sizeof(float) * static_cast<size_t>(head_dim));
}

template <typename T>
void write(const float* x, T* out, int n) {
    for (int i = 0; i < n; ++i) from_float(x[i], out + i);
}

template <typename T>
void append(const RopeAppendParams& p, int seq, int row, const float* cos_sin) {
    const int64_t slot = int64_t{p.kv_len[seq]} + p.first_node[seq] + row;
    const int64_t page_index = slot / p.table.page_size;
    if (page_index >= p.table.max_pages) return;  // past the sequence's pages: no such slot
    const int64_t page = p.table.pages[seq * p.table.stride + page_index];
    const int64_t at = (page * p.table.page_size + slot % p.table.page_size) * p.num_kv_heads;
    for (int h = 0; h < p.num_kv_heads; ++h) {
        const int64_t out = (at + h) * p.head_dim;
        float roped[256];
        rotate(p.k + seq * p.k_stride[0] + row * p.k_stride[1] + h * p.k_stride[2], cos_sin, roped,
               p.head_dim);
        write(roped, static_cast<T*>(p.k_cache) + out, p.head_dim);
        write(p.v + seq * p.v_stride[0] + row * p.v_stride[1] + h * p.v_stride[2],
              static_cast<T*>(p.v_cache) + out, p.head_dim);
    }
}

template <typename T>
void one_row(const RopeAppendParams& p, int seq, int row) {
    if (row >= p.num_nodes[seq]) return;
    // A node past the context limit is never accepted; the clamp only keeps its read in bounds.
    const int position = p.kv_len[seq] + p.depth[seq * p.depth_stride + row];
    const int known = position < p.max_positions ? position : p.max_positions - 1;
    const float* cos_sin = p.cos_sin + int64_t{known} * p.head_dim;
    for (int h = 0; h < p.num_heads; ++h) {
        float* q = p.q + seq * p.q_stride[0] + row * p.q_stride[1] + h * p.q_stride[2];
        rotate(q, cos_sin, q, p.head_dim);
    }
    append<T>(p, seq, row, cos_sin);
}

}  // namespace

void rope_append_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const RopeAppendParams*>(params);
    const int64_t total = int64_t{p.num_seqs} * p.num_rows;
    for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i) {
        const int seq = static_cast<int>(i / p.num_rows), row = static_cast<int>(i % p.num_rows);
        switch (p.cache_dtype) {
            case DType::kBFloat16:
                one_row<bf16>(p, seq, row);
                break;
            case DType::kFloat16:
                one_row<f16>(p, seq, row);
                break;
            default:
                one_row<float>(p, seq, row);
                break;
        }
    }
}

}  // namespace specrt::SPECRT_ISA
