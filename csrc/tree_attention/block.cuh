// One block of 64 keys for a warp's 16 rows: scores, softmax terms, weighted values, on the tensor
// cores. Keys and values lie in shared memory; which row of it a position's key is in is looked up
// for the part of the sequence that differs from node to node (a node's ancestors), so that a key
// is always multiplied at its own position's place, committed or not.
//
// Hazard: what is not visible must not be touched even by a zero, since 0 * NaN is NaN. Positions
// without a key take the row's own; and rows of other nodes are left alone by selection.
#pragma once
#include "core/tanh.h"
#include "core/vector.cuh"
#include "tree_attention/plan.cuh"
#include "tree_attention/state.cuh"

namespace specrt::attention {

constexpr int kGroups = kBlock / 16;  // of 16 keys, the depth of one mma

// Elements of a row in shared memory. D / 8 units of 16 bytes are evenly many for every D there is,
// and one more makes them odd: the eight rows of a matrix that ldmatrix reads begin in eight
// different groups of banks.
template <int D>
constexpr int kStride = D + 8;

// Who holds what in an mma.m16n8k16, with g = lane / 4 and t = 2 * (lane % 4); two neighbours along
// the row each (along the depth, in B):
//
//     A, 16 x 16              B, 16 deep x 8        C, 16 x 8 (float32)
//            t     t + 8             g                     t
//     g      a[0]  a[2]       t      b[0]           g      c[0] c[1]
//     g + 8  a[1]  a[3]       t + 8  b[1]           g + 8  c[2] c[3]
//
// So the C of two neighbouring groups of eight keys is, rounded to 16 bits, the A of their sixteen:
// softmax terms go into the product with values without a shuffle (pack_group). And a thread has
// two rows of the warp's sixteen, g and g + 8: `i` counts them everywhere below.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const T two[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, two, 4);
    return bits;
}

// Keys and values of the rows' pool in shared memory.
template <typename T, int D>
struct Pool {
    T *keys, *values;
    __device__ const T* key(int row) const { return keys + row * kStride<D>; }
    __device__ const T* value(int row) const { return values + row * kStride<D>; }
};

// Lanes 8 m .. 8 m + 7 address the rows of matrix m, of the four 8 x 8 ones of 16 keys x 16
// columns, so that ldmatrix gives two B fragments: of eight keys each for scores, and transposed,
// of eight columns each, for values.
//
//     scores              0..7  8..15 (depth)         values, .trans      0..7  8..15 (columns)
//     keys 0..7           m0    m1    -> b[0], b[1]   keys 0..7  (depth)  m0    m2
//     keys 8..15          m2    m3    -> b[2], b[3]   keys 8..15          m1    m3
//                                                              b[0], b[1] -'     `- b[2], b[3]
__device__ __forceinline__ int score_key(int lane) {
    return lane % 8 + lane / 16 * 8;
}
__device__ __forceinline__ int score_column(int lane) {
    return lane / 8 % 2 * 8;
}
__device__ __forceinline__ int value_key(int lane) {
    return lane % 16;
}
__device__ __forceinline__ int value_column(int lane) {
    return lane / 16 * 8;
}

// Scores of 16 rows with kCount times 16 keys; this lane's matrix rows begin at `key`. Each result
// is one chain of dependent products over the depth, whatever kCount is; several chains at a time
// keep the tensor cores from waiting for one.
template <typename T, int D, int kCount>
__device__ __forceinline__ void score_groups(const uint32_t (&q)[D / 16][4],
                                             const T* const (&key)[kCount],
                                             float (&out)[2 * kCount][4]) {
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int g = 0; g < kCount; ++g) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, key[g] + 16 * k);
            ptx::mma_m16n8k16(out[2 * g], q[k], {b[0], b[1]}, T{});
            ptx::mma_m16n8k16(out[2 * g + 1], q[k], {b[2], b[3]}, T{});
        }
}

// acc += p * values of 16 keys, in the thread's rows that `is_mine` tells.
template <typename T, int D, bool kAllMine>
__device__ __forceinline__ void value_group(const uint32_t (&p)[4], const T* value,
                                            const bool (&is_mine)[2], float (&acc)[D / 8][4]) {
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, value + 16 * c);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float (&a)[4] = acc[2 * c + half];
            if constexpr (kAllMine) {
                ptx::mma_m16n8k16(a, p, {b[2 * half], b[2 * half + 1]}, T{});
            } else {
                float sum[4] = {a[0], a[1], a[2], a[3]};
                ptx::mma_m16n8k16(sum, p, {b[2 * half], b[2 * half + 1]}, T{});
#pragma unroll
                for (int e = 0; e < 4; ++e) a[e] = is_mine[e / 2] ? sum[e] : a[e];
            }
        }
    }
}

// What products become scores by, in units of log2(e): cap * tanh(scale * product), or without a
// cap scale * product.
struct Scaling {
    float scale, cap;
};

template <bool kPlain>
__device__ __forceinline__ Scaling scaling_of(const TreeAttentionParams& p) {
    constexpr float kLog2E = 1.44269504088896341f;
    if (kPlain || p.cap == 0.0f) return {__fmul_rn(p.scale, kLog2E), 0.0f};
    return {__fdiv_rn(p.scale, p.cap), __fmul_rn(p.cap, kLog2E)};
}

template <bool kPlain>
__device__ __forceinline__ void scale_scores(float (&scores)[8][4], const Scaling& by) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] = __fmul_rn(scores[n][e], by.scale);
    if constexpr (!kPlain) {
        if (by.cap == 0.0f) return;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[n][e] = __fmul_rn(tanh_of(scores[n][e]), by.cap);
    }
}

// Scores become exp2(score - max); the state is brought to the new maximum.
template <int D>
__device__ __forceinline__ void soften(float (&scores)[8][4], State<D>& s) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = s.max[i];
#pragma unroll
        for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
        const float base = base_of(top);
        scale[i] = ptx::exp2_approx(s.max[i] - base);
        s.max[i] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 2 * i; e < 2 * i + 2; ++e) {
                scores[n][e] = ptx::exp2_approx(scores[n][e] - base);
                sum = __fadd_rn(sum, scores[n][e]);
            }
        s.sum[i] = __fmaf_rn(s.sum[i], scale[i], sum);
    }
    // Most blocks bring no new maximum, and to multiply by one changes nothing.
    if (__all_sync(kFullWarp, scale[0] == 1.0f && scale[1] == 1.0f)) return;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s.acc[n][e] = __fmul_rn(s.acc[n][e], scale[e / 2]);
}

// The A fragment of group g of the softmax terms.
template <typename T>
__device__ __forceinline__ void pack_group(const float (&p)[8][4], int g, uint32_t (&a)[4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        a[2 * n] = pack<T>(p[2 * g + n][0], p[2 * g + n][1]);
        a[2 * n + 1] = pack<T>(p[2 * g + n][2], p[2 * g + n][3]);
    }
}

// A block that all rows see whole: its keys are pool rows `first` and on.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void whole_block(const uint32_t (&q)[D / 16][4], const Pool<T, D>& pool,
                                            int first, const Scaling& by, State<D>& s) {
    const int lane = threadIdx.x % 32;
    const T* key[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
        key[g] = pool.key(first + 16 * g + score_key(lane)) + score_column(lane);
    float scores[2 * kGroups][4];
    score_groups<T, D, kGroups>(q, key, scores);
    scale_scores<kPlain>(scores, by);
    soften(scores, s);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        uint32_t p[4];
        pack_group<T>(scores, g, p);
        const T* value = pool.value(first + 16 * g + value_key(lane)) + value_column(lane);
        value_group<T, D, true>(p, value, {true, true}, s.acc);
    }
}

// What the rows of a warp see from `begin` on, where the prefix ends or has ended, or windows
// begin.
template <bool kPlain>
struct Tail {
    const uint8_t* ancestors;   // [node][128]: a node's ancestors and itself, from the root down
    const int* counts;          // [node]: how many they are
    int begin, prefix;          // a multiple of 64 and the keys committed
    int first_node, last_node;  // of the warp's rows, as `ancestors` counts them
    int node[2];                // of the thread's rows
    int pool_row;               // of position `begin`
    int window;                 // not if kPlain, as what follows
    int least, most;            // of the first positions in the windows of the warp's rows

    // Pool rows `pool_row` and on hold positions begin and on of the prefix, 64 and on the tree's
    // slots. Past its last key a node has itself again, as if decoded alone, and where its window
    // begins within sixteen positions its first key before that: a zero times a value may still
    // show the value's size.
    __device__ int row_of(int node, int position) const {
        if constexpr (!kPlain) position = max(position, min(first(node), position | 15));
        if (position < prefix) return pool_row + position - begin;
        const int last = max(counts[node] - 1, 0);
        return 64 + ancestors[node * 128 + min(position - prefix, last)];
    }
    __device__ int end(int node) const { return prefix + counts[node]; }
    // A row that does not see itself is where the root is.
    __device__ int first(int node) const {
        return kPlain ? 0 : max(prefix + max(counts[node], 1) - window, 0);
    }
    // Whether a node sees any of 16 positions.
    __device__ bool sees(int node, int position) const {
        return position < end(node) && (kPlain || position + 16 > first(node));
    }
};

// How 16 positions from `position` on are seen by a warp's rows.
enum class Sight { kAll, kByNode, kNone };

template <bool kPlain>
__device__ __forceinline__ Sight sight(const Tail<kPlain>& t, int position, int end) {
    if (position + 16 <= t.prefix && (kPlain || position >= t.most)) return Sight::kAll;
    if (!kPlain && position + 16 <= t.least) return Sight::kNone;
    return position < end ? Sight::kByNode : Sight::kNone;
}

template <typename T, int D, bool kPlain>
__device__ __forceinline__ void tail_scores(const uint32_t (&q)[D / 16][4], const Pool<T, D>& pool,
                                            const Tail<kPlain>& t, int position, int end,
                                            float (&out)[2][4]) {
    const int lane = threadIdx.x % 32, key = position + score_key(lane);
    const Sight seen = sight(t, position, end);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[n][e] = kNone;
    if (seen == Sight::kNone) return;
    const int last = seen == Sight::kAll ? t.first_node : t.last_node;
    for (int node = t.first_node; node <= last; node += 2) {  // two at a time
        const int nodes[2] = {node, min(node + 1, last)};
        if (!t.sees(nodes[0], position) && !t.sees(nodes[1], position)) continue;
        const T* keys[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            keys[i] = pool.key(t.row_of(nodes[i], key)) + score_column(lane);
        float part[4][4];
        score_groups<T, D, 2>(q, keys, part);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (seen == Sight::kByNode && t.node[e / 2] != nodes[i]) continue;
                out[0][e] = part[2 * i][e], out[1][e] = part[2 * i + 1][e];
            }
    }
}

template <typename T, int D, bool kPlain>
__device__ __forceinline__ void tail_values(const uint32_t (&p)[4], const Pool<T, D>& pool,
                                            const Tail<kPlain>& t, int position, int end,
                                            State<D>& s) {
    const int lane = threadIdx.x % 32, key = position + value_key(lane);
    const Sight seen = sight(t, position, end);
    if (seen == Sight::kNone) return;
    if (seen == Sight::kAll) {
        const T* value = pool.value(t.row_of(t.first_node, key)) + value_column(lane);
        value_group<T, D, true>(p, value, {true, true}, s.acc);
        return;
    }
    for (int node = t.first_node; node <= t.last_node; ++node) {
        if (!t.sees(node, position)) continue;  // terms of zero, which change nothing
        const T* value = pool.value(t.row_of(node, key)) + value_column(lane);
        value_group<T, D, false>(p, value, {t.node[0] == node, t.node[1] == node}, s.acc);
    }
}

// A block at `position` that rows see differently: `end` is past the last key any of them sees.
template <typename T, int D, bool kPlain>
__device__ __forceinline__ void tail_block(const uint32_t (&q)[D / 16][4], const Pool<T, D>& pool,
                                           const Tail<kPlain>& t, int position, int end,
                                           const Scaling& by, State<D>& s) {
    const int column = threadIdx.x % 4 * 2;
    float scores[8][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        float part[2][4];
        tail_scores<T, D>(q, pool, t, position + 16 * g, end, part);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[2 * g + n][e] = part[n][e];
    }
    scale_scores<kPlain>(scores, by);
    const int row_end[2] = {t.end(t.node[0]), t.end(t.node[1])};
    const int row_first[2] = {t.first(t.node[0]), t.first(t.node[1])};
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = position + 8 * n + column + e % 2;
            const bool is_visible = key < row_end[e / 2] && (kPlain || key >= row_first[e / 2]);
            scores[n][e] = is_visible ? scores[n][e] : kNone;
        }
    soften(scores, s);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        uint32_t p[4];
        pack_group<T>(scores, g, p);
        tail_values<T, D>(p, pool, t, position + 16 * g, end, s);
    }
}

}  // namespace specrt::attention
