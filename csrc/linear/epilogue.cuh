// From sums in registers to rows of the result: slices meet, and what is left goes through shared
// memory, where a thread finds neighbouring results of one row.
#pragma once
#include "core/pack.cuh"
#include "core/silu.cuh"
#include "linear/mainloop_sm80.cuh"

namespace specrt::product {

// Floats from one row of x to the next, in shared memory: a warp's sums go to 32 banks.
template <typename G>
constexpr int kStaged = G::kTile + 4;

template <typename G>
__device__ __forceinline__ void put_staged(float* staged, int stripe, int group,
                                           const float (&sums)[4]) {
    float* to = staged + column_of<G>(group) * kStaged<G> + weight_of<G>(stripe);
    to[0] = sums[0], to[kStaged<G>] = sums[1];
    to[8] = sums[2], to[kStaged<G> + 8] = sums[3];
}

template <typename G>
__device__ __forceinline__ void put_all_staged(float* staged, const Sums<G>& sums) {
#pragma unroll
    for (int s = 0; s < G::kStripes; ++s)
#pragma unroll
        for (int g = 0; g < G::kGroups; ++g) put_staged<G>(staged, s, g, sums[s][g]);
}

// A tile's slices in the workspace: [slice][stripe][group][thread] of a thread's four sums.
template <typename G>
struct Parts {
    static constexpr int kFragments = G::kStripes * G::kGroups;
    static constexpr int64_t kPart = int64_t{kFragments} * G::kThreads;  // of 4 floats
    float4* first;

    __device__ float4* at(int slice, int fragment) const {
        return first + slice * kPart + fragment * G::kThreads + threadIdx.x;
    }
};

template <typename G>
__device__ __forceinline__ void write_part(const Parts<G>& parts, int slice, const Sums<G>& sums) {
#pragma unroll
    for (int s = 0; s < G::kStripes; ++s)
#pragma unroll
        for (int g = 0; g < G::kGroups; ++g) {
            const float (&x)[4] = sums[s][g];
            *parts.at(slice, s * G::kGroups + g) = make_float4(x[0], x[1], x[2], x[3]);
        }
}

__device__ __forceinline__ float4 sum_of(const float4& a, const float4& b) {
    return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                       __fadd_rn(a.w, b.w));
}

// Adds up to kMost slices in the aligned tree. Many are asked for before any is waited for.
template <typename G, int kMost>
__device__ __forceinline__ void merge_parts(const Parts<G>& parts, int count, float* staged) {
    constexpr int kFragments = Parts<G>::kFragments;
    constexpr int kLoads = kMost > 4 ? 16 : 32;  // under way, as registers allow
    constexpr int kBatch = kFragments < kLoads / kMost ? kFragments : kLoads / kMost;
#pragma unroll 1
    for (int first = 0; first < kFragments; first += kBatch) {
        float4 part[kBatch][kMost];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
            for (int s = 0; s < kMost; ++s) part[b][s] = *parts.at(min(s, count - 1), first + b);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int width = 1; width < kMost; width *= 2)
#pragma unroll
                for (int s = 0; s + width < kMost; s += 2 * width)
                    if (s + width < count) part[b][s] = sum_of(part[b][s], part[b][s + width]);
            const float4& x = part[b][0];
            const int fragment = first + b;
            put_staged<G>(staged, fragment / G::kGroups, fragment % G::kGroups,
                          {x.x, x.y, x.z, x.w});
        }
    }
}

template <typename G>
__device__ __forceinline__ void merge_all(const Parts<G>& parts, int count, float* staged) {
    if (count <= 2) return merge_parts<G, 2>(parts, count, staged);
    if (count <= 4) return merge_parts<G, 4>(parts, count, staged);
    if (count <= 8) return merge_parts<G, 8>(parts, count, staged);
    merge_parts<G, kMaxSlices>(parts, count, staged);
}

// Where a tile's results go: eight neighbours at a time.
struct Target {
    int first_weight, first_row;  // of the tile and of the piece
    int num_results;              // of a row: N, or N / 2 if gated
    bool is_whole;
};

// One rounding for each step, in float32.
__device__ __forceinline__ float with_bias(const LinearParams& p, float sum, int weight) {
    if (weight >= p.num_outputs) return sum;
    if (p.scale) sum = __fmul_rn(sum, p.scale[weight]);
    return p.bias ? __fadd_rn(sum, p.bias[weight]) : sum;
}

// Eight results of a row, `staged` being its sums of the tile. Rows of weights that are gated come
// by turns, eight of gate and eight of up.
__device__ __forceinline__ Pack<float, 8> results_of(const LinearParams& p, const float* staged,
                                                     int first_weight, int at) {
    const int from = p.is_gated ? 2 * at : at;
    Pack<float, 8> result;
#pragma unroll
    for (int e = 0; e < 8; ++e)
        result.at[e] = with_bias(p, staged[from + e], first_weight + from + e);
    if (!p.is_gated) return result;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const float up = with_bias(p, staged[from + 8 + e], first_weight + from + 8 + e);
        result.at[e] = __fmul_rn(silu(result.at[e]), up);
    }
    return result;
}

template <typename T>
__device__ __forceinline__ Pack<T, 8> operand_of(const RowOperand& o, const Target& t, int row,
                                                 int first) {
    const T* from = static_cast<const T*>(o.rows) + chosen_row(o, row) * o.stride;
    return load_piece<8>(from, first, t.num_results, t.is_whole);
}

template <typename Out>
__device__ __forceinline__ void store_results(const LinearParams& p, const Target& t, int row,
                                              int first, const Pack<float, 8>& result) {
    Pack<Out, 8> rounded;
#pragma unroll
    for (int e = 0; e < 8; ++e) rounded.at[e] = from_float<Out>(result.at[e]);
    Out* to = static_cast<Out*>(p.out) + row * p.out_stride;
    store_piece(to, first, t.num_results, t.is_whole, rounded);
}

// The rows of the piece that there are, from their sums.
template <typename G>
__device__ __forceinline__ void write_results(const LinearParams& p, const Target& t,
                                              const float* staged) {
    using T = typename G::Value;
    const int shrink = p.is_gated ? 2 : 1, width = G::kTile / shrink, pieces = width / 8;
    for (int i = threadIdx.x; i < G::kColumns * pieces; i += G::kThreads) {
        const int column = i / pieces, at = i % pieces * 8;
        const int row = t.first_row + column, first = t.first_weight / shrink + at;
        if (row >= p.num_rows) return;
        if (first >= t.num_results) continue;
        Pack<float, 8> result = results_of(p, staged + column * kStaged<G>, t.first_weight, at);
        if (p.gate.rows) {
            const Pack<T, 8> gate = operand_of<T>(p.gate, t, row, first);
#pragma unroll
            for (int e = 0; e < 8; ++e)
                result.at[e] = __fmul_rn(silu(to_float(gate.at[e])), result.at[e]);
        }
        if (p.residual.rows) {
            const Pack<T, 8> residual = operand_of<T>(p.residual, t, row, first);
#pragma unroll
            for (int e = 0; e < 8; ++e)
                result.at[e] = __fadd_rn(result.at[e], to_float(residual.at[e]));
        }
        if (p.out_dtype == DType::kFloat32) {
            store_results<float>(p, t, row, first, result);
        } else {
            store_results<T>(p, t, row, first, result);
        }
    }
}

}  // namespace specrt::product
