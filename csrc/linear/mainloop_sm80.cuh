// The products of one tile of weights with one piece of x over one slice of K, by mma.sync, fed by
// a ring of stages through cp.async.
//
// Weights are A, rows of x are B: D[16 weights, 8 rows] += A[16 weights, 16 k] B[16 k, 8 rows].
// Both lie in memory with k contiguous, as mma wants them, and so the many weights fill the
// instruction's larger side whatever the number of rows.
//
// A stage holds 64 k of each row, 128 bytes, in chunks of 16. Chunk c of row r is at place
// c ^ r % 8, so that the eight rows that ldmatrix reads at once, and the eight chunks that eight
// threads write, lie in different banks. Weights of one byte (e4m3.cuh) take 64 bytes, two rows to
// 128, and become 16 bits in registers: what is multiplied, and in which order, stays the same.
//
//     step i        0    1    2    3        stage i % n has k from 64 i on; n = 4 here
//     wait for      0    1    2    3        its group of cp.async
//     barrier                               all see it, and nobody reads step i - 1 any more
//     fetch         3    4    5    6        into the stage that held step i - 1
//     multiply      0    1    2    3
#pragma once
#include "core/open.cuh"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "linear/e4m3.cuh"
#include "linear/plan.cuh"

namespace specrt::product {

// How a block's tile of kTile weights and kColumns rows of x is shared by its warps: four along the
// weights, and as many along the rows as give each no more than 32 of them. A warp waits for its
// own last instruction most of the time, so many of few products hide more than few of many.
template <typename T, int kTileRows, int kPadded, typename W = T>
struct Tiling {
    using Value = T;
    using Weight = W;
    static constexpr int kTile = kTileRows, kColumns = kPadded;
    static constexpr int kSides = kColumns > 32 ? kColumns / 32 : 1;
    static constexpr int kThreads = 128 * kSides;
    static constexpr int kStripes = kTile / 64;            // of 16 weights, a warp's
    static constexpr int kGroups = kColumns / kSides / 8;  // of 8 rows of x, a warp's
    static constexpr int kWeights = kTile * kDepth * sizeof(W) / sizeof(T);  // in values of x
    static constexpr int kStage = kWeights + kColumns * kDepth;              // weights, then x
};

// A thread's sums of stripe s and group g, with i = lane / 4 and j = lane % 4 * 2: of weights i and
// i + 8 of the stripe with rows j and j + 1 of the group, as C of mma.m16n8k16 is laid out.
template <typename G>
using Sums = float[G::kStripes][G::kGroups][4];

// The first of the thread's four: weight within the tile, row of x within the piece.
template <typename G>
__device__ __forceinline__ int weight_of(int stripe) {
    const int warp = threadIdx.x / 32 % 4;
    return (warp * G::kStripes + stripe) * 16 + threadIdx.x % 32 / 4;
}
template <typename G>
__device__ __forceinline__ int column_of(int group) {
    const int side = threadIdx.x / 128;
    return (side * G::kGroups + group) * 8 + threadIdx.x % 4 * 2;
}

// What a block works on.
template <typename T, typename W>
struct Work {
    const W* weights;  // the tile's first
    RowOperand x, second;
    int64_t depth;              // from one row of weights to the next
    int first_row;              // the piece's
    int num_weights, num_rows;  // that there are; at least one
    int begin, end;             // of K
    int second_begin;
    uint64_t weight_policy, row_policy;

    __device__ int num_steps() const { return (end - begin + kDepth - 1) / kDepth; }
};

// In values of E, which there are kDepth of in a row.
template <typename E = uint16_t>
__device__ __forceinline__ int place_of(int row, int chunk) {
    constexpr int kChunks = kDepth * sizeof(E) / 16, kRowsInLine = 8 / kChunks;
    return row * kDepth + (chunk ^ row / kRowsInLine % kChunks) * (kDepth / kChunks);
}

// Values k .. k + 63 of the tile's rows of weights; zeros where there is none and past the slice's
// end, where nothing is read.
template <typename G, typename T, typename W>
__device__ __forceinline__ void fetch_weights(const Work<T, W>& w, T* stage, int k) {
    constexpr int kChunks = kDepth * sizeof(W) / 16, kAtOnce = G::kThreads / kChunks;
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    const int at = k + chunk * (kDepth / kChunks);
    W* to = reinterpret_cast<W*>(stage);
    const W* from = w.weights + first * w.depth + at;
#pragma unroll
    for (int i = 0; i < G::kTile; i += kAtOnce, from += kAtOnce * w.depth)
        ptx::cp_async_16(to + place_of<W>(first + i, chunk), from,
                         at < w.end && first + i < w.num_weights, w.weight_policy);
}

// Which rows of the tables the thread fetches: eight threads share one, and it has kEach.
template <typename G>
struct Chosen {
    static constexpr int kAtOnce = G::kThreads / 8;
    static constexpr int kEach = G::kColumns > kAtOnce ? G::kColumns / kAtOnce : 1;
    int x[kEach], second[kEach];

    // Within the piece. With fewer rows than threads for them, several threads have the same.
    __device__ static int column(int i) { return threadIdx.x / 8 % G::kColumns + i * kAtOnce; }
};

template <typename G, typename T, typename W>
__device__ __forceinline__ Chosen<G> choose_rows(const Work<T, W>& w) {
    Chosen<G> chosen;
#pragma unroll
    for (int i = 0; i < Chosen<G>::kEach; ++i) {
        const bool is_there = chosen.column(i) < w.num_rows;
        const int row = w.first_row + chosen.column(i);
        chosen.x[i] = is_there ? static_cast<int>(chosen_row(w.x, row)) : 0;
        chosen.second[i] = is_there ? static_cast<int>(chosen_row(w.second, row)) : 0;
    }
    return chosen;
}

// Where the values from `at` on, eight of which lie side by side, are in the thread's row i.
template <typename G, typename T, typename W>
__device__ __forceinline__ const T* values_at(const Work<T, W>& w, const Chosen<G>& chosen, int i,
                                              int at) {
    const bool is_second = at >= w.second_begin;
    const auto* rows = static_cast<const T*>(is_second ? w.second.rows : w.x.rows);
    const int64_t row = is_second ? chosen.second[i] : chosen.x[i];
    const int64_t stride = is_second ? w.second.stride : w.x.stride;
    return rows + row * stride + (is_second ? at - w.second_begin : at);
}

// As fetch_weights, of the piece's rows of x.
template <typename G, typename T, typename W>
__device__ __forceinline__ void fetch_rows(const Work<T, W>& w, const Chosen<G>& chosen, T* stage,
                                           int k) {
    const int chunk = threadIdx.x % 8, at = k + chunk * 8;
    if (threadIdx.x / 8 >= G::kColumns) return;
    T* to = stage + G::kWeights;
#pragma unroll
    for (int i = 0; i < Chosen<G>::kEach; ++i)
        ptx::cp_async_16(to + place_of(chosen.column(i), chunk), values_at(w, chosen, i, at),
                         at < w.end && chosen.column(i) < w.num_rows, w.row_policy);
}

// The same of the first `count` stages, before weights that are on their way: through registers,
// as groups of cp.async end in their order only.
template <typename G, typename T, typename W>
__device__ __forceinline__ void copy_rows(const Work<T, W>& w, const Chosen<G>& chosen, T* ring,
                                          int count) {
    constexpr int kBatch = 8, kChunks = G::kColumns * 8;  // of a stage
    static_assert(kBatch % Chosen<G>::kEach == 0, "a batch begins with the thread's first row");
    const int total = count * kChunks;
    for (int first = threadIdx.x; first < total; first += kBatch * G::kThreads) {
        Pack<T, 8> chunk[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = first + b * G::kThreads, row = i % kChunks / 8;
            const int at = w.begin + i / kChunks * kDepth + i % 8 * 8;
            chunk[b] = {};
            if (i < total && at < w.end && row < w.num_rows)
                chunk[b] = load_pack<8>(values_at(w, chosen, b % Chosen<G>::kEach, at));
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = first + b * G::kThreads;
            T* stage = ring + i / kChunks * G::kStage + G::kWeights;
            if (i < total) store_shared_pack(stage + place_of(i % kChunks / 8, i % 8), chunk[b]);
        }
    }
}

// Lanes 8 m .. 8 m + 7 address the rows of matrix m, of the four 8 x 8 ones of 16 rows x 16 k:
//
//     A             k 0..7  8..15          B, two groups    k 0..7  8..15
//     weights 0..7    m0     m2            rows 0..7          m0     m1    -> b[0], b[1]
//     weights 8..15   m1     m3            rows 8..15         m2     m3    -> b[2], b[3]
//
// Of one byte, the matrices of A are 8 x 16, and the four of them 16 rows x 32 k.
template <typename G, typename W = typename G::Weight>
struct Stripes {
    uint32_t bytes[G::kStripes][4];  // of two groups of 16 k

    // Group k of the stage into `a`; called in order.
    __device__ void load(const W* weights, int k, uint32_t (&a)[G::kStripes][4]) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int first = warp % 4 * G::kStripes * 16 + lane % 16;
#pragma unroll
        for (int s = 0; s < G::kStripes; ++s) {
            if constexpr (sizeof(W) == 2) {
                ptx::ldmatrix_x4(a[s], weights + place_of(first + 16 * s, 2 * k + lane / 16));
            } else {
                const W* from = weights + place_of<W>(first + 16 * s, k + lane / 16);
                if (k % 2 == 0) ptx::ldmatrix_x4(bytes[s], from);
                widen<typename G::Value>(bytes[s][k % 2 * 2], a[s][0], a[s][2]);
                widen<typename G::Value>(bytes[s][k % 2 * 2 + 1], a[s][1], a[s][3]);
            }
        }
    }
};

template <typename G, typename T>
__device__ __forceinline__ void multiply_stage(const T* stage, Sums<G>& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto* weights = reinterpret_cast<const typename G::Weight*>(stage);
    const T* rows = stage + G::kWeights;
    Stripes<G> stripes;
    const int first_row = warp / 4 * G::kGroups * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t a[G::kStripes][4];
        stripes.load(weights, k, a);
        if constexpr (G::kGroups == 1) {
            uint32_t b[2];
            ptx::ldmatrix_x2(b, rows + place_of(first_row, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int s = 0; s < G::kStripes; ++s) ptx::mma_m16n8k16(sums[s][0], a[s], b, T{});
        } else {
#pragma unroll
            for (int g = 0; g < G::kGroups; g += 2) {
                uint32_t b[4];
                const int row = first_row + 8 * g + lane / 16 * 8;
                ptx::ldmatrix_x4(b, rows + place_of(row, 2 * k + lane / 8 % 2));
#pragma unroll
                for (int s = 0; s < G::kStripes; ++s) {
                    ptx::mma_m16n8k16(sums[s][g], a[s], {b[0], b[1]}, T{});
                    ptx::mma_m16n8k16(sums[s][g + 1], a[s], {b[2], b[3]}, T{});
                }
            }
        }
    }
}

// Until the oldest stage under way is there.
__device__ __forceinline__ void wait_for_stage(int num_stages) {
    switch (num_stages) {
        case 2:
            return ptx::cp_async_wait<0>();
        case 3:
            return ptx::cp_async_wait<1>();
        case 4:
            return ptx::cp_async_wait<2>();
        case 5:
            return ptx::cp_async_wait<3>();
        case 6:
            return ptx::cp_async_wait<4>();
        case 7:
            return ptx::cp_async_wait<5>();
        default:
            return ptx::cp_async_wait<6>();
    }
}

template <typename G, typename T, typename W>
__device__ __forceinline__ void fetch_weights_ahead(const Work<T, W>& w, T* ring, int num_ahead) {
    for (int i = 0; i < num_ahead; ++i) {
        if (i < w.num_steps()) fetch_weights<G>(w, ring + i * G::kStage, w.begin + i * kDepth);
        ptx::cp_async_commit();
    }
}

// Fills all stages but one. Weights are constants: they are on their way before the launch before
// has ended, which may have written x. That is spared where it seems that no sequence is open;
// where it seems that one is, nobody waits for the flags before x is there too. False: none is
// open.
template <typename G, typename T, typename W>
__device__ __forceinline__ bool fetch_ahead(const Work<T, W>& w, const Openness& openness, T* ring,
                                            int num_ahead, Chosen<G>& chosen) {
    const bool seems_open = is_any_open(ask_flags(openness));
    if (seems_open) fetch_weights_ahead<G>(w, ring, num_ahead);
    ptx::wait_for_previous();
    const int32_t flags = ask_flags(openness);
    if (!seems_open) {
        if (!is_any_open(flags)) return false;
        fetch_weights_ahead<G>(w, ring, num_ahead);
    }
    chosen = choose_rows<G>(w);
    copy_rows(w, chosen, ring, min(num_ahead, w.num_steps()));
    const bool is_open = is_any_open(flags);
    if (!is_open) ptx::cp_async_wait<0>();
    return is_open;
}

// False, and nothing written, where no sequence is open.
template <typename G, typename T, typename W>
__device__ __forceinline__ bool multiply(const Work<T, W>& w, const Openness& openness, T* ring,
                                         int num_stages, Sums<G>& sums) {
    const int num_steps = w.num_steps(), num_ahead = num_stages - 1;
    Chosen<G> chosen;
    if (!fetch_ahead(w, openness, ring, num_ahead, chosen)) return false;
    int now = 0, next = num_ahead;  // stages
    for (int i = 0; i < num_steps; ++i) {
        wait_for_stage(num_stages);
        __syncthreads();  // step i is there, and step i - 1 no longer read
        if (i + num_ahead < num_steps) {
            const int k = w.begin + (i + num_ahead) * kDepth;
            fetch_weights<G>(w, ring + next * G::kStage, k);
            fetch_rows(w, chosen, ring + next * G::kStage, k);
        }
        ptx::cp_async_commit();
        multiply_stage<G>(ring + now * G::kStage, sums);
        now = now + 1 < num_stages ? now + 1 : 0;
        next = next + 1 < num_stages ? next + 1 : 0;
    }
    ptx::cp_async_wait<0>();
    return true;
}

}  // namespace specrt::product
