// Plain loops: each element is a product, a product and a sum, which the compiler may vectorise but
// (-ffp-contract=off) not fuse, so the bits are those of the Hugging Face expression everywhere.
#include "core/rows.h"
#include "rope_append/rope_append.h"

namespace specrt::SPECRT_ISA {
namespace {

// "rotate_half": element i pairs with i + d / 2. `out` may be `x`.
template <typename T, typename Out>
void rotate(const T* x, const float* cos_sin, Out* out, int head_dim) {
    const int half = head_dim / 2;
    const float *cosine = cos_sin, *sine = cos_sin + half;
    float wide[256], rotated[256];
    for (int i = 0; i < head_dim; ++i) wide[i] = to_float(x[i]);
    for (int i = 0; i < half; ++i) rotated[i] = wide[i] * cosine[i] - wide[i + half] * sine[i];
    for (int i = 0; i < half; ++i)
        rotated[i + half] = wide[i + half] * cosine[i] + wide[i] * sine[i];
    for (int i = 0; i < head_dim; ++i) from_float(rotated[i], out + i);
}

template <typename T, typename Cache>
void append(const RopeAppendParams& p, int seq, int row, const float* cos_sin) {
    const uint32_t slot = slot_of(p, seq, row);
    if (!has_slot(p.table, slot)) return;
    const int64_t at = row_of_slot(p.table, seq, slot) * p.num_kv_heads;
    const auto source = [&](const void* x, const int64_t* stride, int head) {
        return static_cast<const T*>(x) + seq * stride[0] + row * stride[1] + head * stride[2];
    };
    for (int h = 0; h < p.num_kv_heads; ++h) {
        const int64_t out = (at + h) * p.head_dim;
        rotate(source(p.k, p.k_stride, h), cos_sin, static_cast<Cache*>(p.k_cache) + out,
               p.head_dim);
        const T* value = source(p.v, p.v_stride, h);
        for (int i = 0; i < p.head_dim; ++i)
            from_float(to_float(value[i]), static_cast<Cache*>(p.v_cache) + out + i);
    }
}

template <typename T, typename Cache>
void one_row(const RopeAppendParams& p, int seq, int row) {
    if (row >= p.num_nodes[seq]) return;
    const float* cos_sin = p.cos_sin + known_position(p, seq, row) * p.head_dim;
    for (int h = 0; h < p.num_heads; ++h) {
        T* q = static_cast<T*>(p.q) + seq * p.q_stride[0] + row * p.q_stride[1] + h * p.q_stride[2];
        rotate(q, cos_sin, q, p.head_dim);
    }
    append<T, Cache>(p, seq, row, cos_sin);
}

}  // namespace

void rope_append_part(const void* params, int part, int num_parts) {
    const auto& p = *static_cast<const RopeAppendParams*>(params);
    const int64_t total = int64_t{p.num_seqs} * p.num_rows;
    with_float_type(p.dtype, [&](auto type) {
        with_float_type(p.cache_dtype, [&](auto cached) {
            for (int64_t i = total * part / num_parts; i < total * (part + 1) / num_parts; ++i)
                one_row<decltype(type), decltype(cached)>(p, static_cast<int>(i / p.num_rows),
                                                          static_cast<int>(i % p.num_rows));
        });
    });
}

}  // namespace specrt::SPECRT_ISA
