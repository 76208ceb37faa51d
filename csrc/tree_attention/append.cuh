// Rotation of queries and keys, and the append of the tree's keys and values to the cache, on the
// way into attention: what rope_append does, to the bit, without a launch and a trip to memory.
#pragma once
#include "core/pack.cuh"
#include "core/rotary.cuh"
#include "tree_attention/block.cuh"
#include "tree_attention/tree_attention.h"

namespace specrt::attention {

// Where the cosines of a row's position begin. A node past the context limit is never accepted; the
// clamp only keeps its read in bounds.
__device__ __forceinline__ const float* angles(const AppendParams& a, int seq, int row, int prefix,
                                               int head_dim) {
    const unsigned depth = a.depth[seq * a.depth_stride + row];
    return a.cos_sin + int64_t{clamp_index(prefix + depth, a.max_positions)} * head_dim;
}

template <typename T>
__device__ __forceinline__ void unpack(uint32_t bits, float (&x)[2]) {
    T two[2];
    memcpy(two, &bits, 4);
    x[0] = to_float(two[0]), x[1] = to_float(two[1]);
}

// Rotates row i (0 or 1) of a thread's queries. Column c pairs with c + D / 2, and D / 2 is a
// multiple of 8: both are the thread's own.
template <typename T, int D>
__device__ __forceinline__ void rotate_queries(uint32_t (&q)[D / 16][4], int i,
                                               const float* cosines) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {  // eight columns each
        const int other = c + D / 16;
        uint32_t &low_bits = q[c / 2][c % 2 * 2 + i], &high_bits = q[other / 2][other % 2 * 2 + i];
        float low[2], high[2];
        unpack<T>(low_bits, low);
        unpack<T>(high_bits, high);
        const Pack<float, 2> cosine = load_pack<2>(cosines + 8 * c + column),
                             sine = load_pack<2>(cosines + D / 2 + 8 * c + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const Rotated r = rotate(low[e], high[e], cosine.at[e], sine.at[e]);
            low[e] = r.low, high[e] = r.high;
        }
        low_bits = pack<T>(low[0], low[1]);
        high_bits = pack<T>(high[0], high[1]);
    }
}

// Eight columns of the lower half of a key and their partners, rotated in place.
template <typename T, int D>
__device__ __forceinline__ void rotate_key(Pack<T, 8>& low, Pack<T, 8>& high,
                                           const float* cosines) {
    const Pack<float, 8> cosine = load_pack<8>(cosines), sine = load_pack<8>(cosines + D / 2);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const Rotated r =
            rotate(to_float(low.at[e]), to_float(high.at[e]), cosine.at[e], sine.at[e]);
        low.at[e] = from_float<T>(r.low), high.at[e] = from_float<T>(r.high);
    }
}

}  // namespace specrt::attention
