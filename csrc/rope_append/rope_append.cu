// Products and sums are those of rope_append_cpu.cpp, each rounded by itself (--fmad=false), so
// both give the same bits.
//
//     a head of 128, bfloat16: 8 threads have 16 bytes of the lower half each, and their partners
//     element   0    8         56   64   72        120
//     thread    0    1   ...   7  | 0    1   ...   7
//
// Queries are rotated in place. That is safe as a pair is one thread's: it has read both before it
// writes either, and nobody else touches them.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/rotary.cuh"
#include "rope_append/rope_append.h"

namespace specrt {
namespace {

constexpr int kBlock = 128;

// kSize elements of a head, and those they are rotated with.
template <int kSize>
struct Pair {
    float low[kSize], high[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Pair<kSize> load_pair(const T* low, int half) {
    const Pack<T, kSize> a = load_pack<kSize>(low), b = load_pack<kSize>(low + half);
    Pair<kSize> pair;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
        pair.low[e] = to_float(a.at[e]);
        pair.high[e] = to_float(b.at[e]);
    }
    return pair;
}

template <typename T, int kSize>
__device__ __forceinline__ void store_pair(T* low, int half, const Pair<kSize>& pair) {
    Pack<T, kSize> a, b;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
        a.at[e] = from_float<T>(pair.low[e]);
        b.at[e] = from_float<T>(pair.high[e]);
    }
    store_pack(low, a);
    store_pack(low + half, b);
}

template <int kSize>
__device__ __forceinline__ Pair<kSize> rotate_pair(const Pair<kSize>& x, const float* cosine,
                                                   int half) {
    const Pair<kSize> angle = load_pair<kSize>(cosine, half);  // cosines, sines
    Pair<kSize> out;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
        const Rotated r = rotate(x.low[e], x.high[e], angle.low[e], angle.high[e]);
        out.low[e] = r.low, out.high[e] = r.high;
    }
    return out;
}

// Heads are numbered through: queries, keys, values.
template <typename T>
__device__ __forceinline__ T* head_at(const RopeAppendParams& p, int seq, int row, int head) {
    const auto at = [&](const void* x, const int64_t* stride, int h) {
        return static_cast<T*>(const_cast<void*>(x)) + seq * stride[0] + row * stride[1] +
               h * stride[2];
    };
    if (head < p.num_heads) return at(p.q, p.q_stride, head);
    head -= p.num_heads;
    if (head < p.num_kv_heads) return at(p.k, p.k_stride, head);
    return at(p.v, p.v_stride, head - p.num_kv_heads);
}

// A thread takes kSize elements of the lower half of a head, and their partners.
template <typename T, typename C, int kSize>
__global__ void __launch_bounds__(kBlock)
    rope_append_pairs(const RopeAppendParams p, const unsigned blocks_per_row) {
    ptx::let_next_start();
    const unsigned index = blockIdx.x / blocks_per_row;
    const int seq = static_cast<int>(index / p.num_rows),
              row = static_cast<int>(index % p.num_rows);
    const int half = p.head_dim / 2, per_head = half / kSize;
    const int unit = static_cast<int>(blockIdx.x % blocks_per_row) * kBlock + threadIdx.x;
    const int head = unit / per_head, first = unit % per_head * kSize;
    ptx::wait_for_previous();
    if (head >= p.num_heads + 2 * p.num_kv_heads) return;
    T* source = head_at<T>(p, seq, row, head) + first;
    // Every row can be read, so the data is asked for beside the counts that tell whether it
    // counts.
    Pair<kSize> x = load_pair<kSize>(source, half);
    const uint32_t slot = slot_of(p, seq, row);
    const int64_t position = known_position(p, seq, row);
    if (row >= p.num_nodes[seq]) return;
    if (head < p.num_heads + p.num_kv_heads)
        x = rotate_pair(x, p.cos_sin + position * p.head_dim + first, half);
    if (head < p.num_heads) return store_pair(source, half, x);
    if (!has_slot(p.table, slot)) return;
    const int64_t at = row_of_slot(p.table, seq, slot) * p.num_kv_heads * p.head_dim;
    const bool is_key = head < p.num_heads + p.num_kv_heads;
    const int kv_head = head - p.num_heads - (is_key ? 0 : p.num_kv_heads);
    C* cache = static_cast<C*>(is_key ? p.k_cache : p.v_cache);
    store_pair(cache + at + int64_t{kv_head} * p.head_dim + first, half, x);
}

template <typename T, typename C, int kSize>
void launch(const RopeAppendParams& p, CudaStream stream) {
    const int64_t heads = int64_t{p.num_heads} + 2 * p.num_kv_heads;
    const unsigned blocks_per_row = ceil_div(heads * (p.head_dim / 2 / kSize), kBlock);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_seqs * p.num_rows) * blocks_per_row),
                            dim3(kBlock), 0, kOverlaps};
    SPECRT_LAUNCH((rope_append_pairs<T, C, kSize>), shape, stream, p, blocks_per_row);
}

// The caches are contiguous, so with half a head of 16-byte pieces their rows begin where they
// must.
bool can_move_16_bytes(const RopeAppendParams& p) {
    const int64_t bytes = size_of(p.dtype);
    bool fits = is_multiple_of_16(p.head_dim / 2 * bytes) && is_multiple_of_16(p.q) &&
                is_multiple_of_16(p.k) && is_multiple_of_16(p.v) && is_multiple_of_16(p.cos_sin) &&
                is_multiple_of_16(p.k_cache) && is_multiple_of_16(p.v_cache);
    for (int i = 0; i < 3; ++i)
        fits = fits && is_multiple_of_16(p.q_stride[i] * bytes) &&
               is_multiple_of_16(p.k_stride[i] * bytes) && is_multiple_of_16(p.v_stride[i] * bytes);
    return fits;
}

template <typename T, typename C>
void launch_types(const RopeAppendParams& p, CudaStream stream) {
    if (can_move_16_bytes(p)) return launch<T, C, 16 / sizeof(T)>(p, stream);
    launch<T, C, 1>(p, stream);
}

}  // namespace

void rope_append_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const RopeAppendParams*>(params);
    if (p.num_seqs * p.num_rows * (p.num_heads + 2 * p.num_kv_heads) == 0) return;
    with_float_type(p.dtype, [&](auto type) {
        with_float_type(p.cache_dtype, [&](auto cached) {
            launch_types<decltype(type), decltype(cached)>(p, stream);
        });
    });
}

}  // namespace specrt
