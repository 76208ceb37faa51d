// A block of threads takes a tile of 64 or 128 rows of weights, a piece of up to 128 rows of x, and
// one slice of K. Where K has several, each leaves its sums in the workspace, and the block that
// comes last of a tile adds them in an order that does not depend on who that is.
//
// Pieces of more than 128 rows are neighbours in the grid, so that weights come from memory once
// and then from the L2 cache.
#pragma once
#include "core/reduce.cuh"
#include "linear/epilogue.cuh"
#include "linear/maxima.cuh"

namespace specrt::product {

template <typename G, typename T, typename W>
__device__ __forceinline__ Work<T, W> work_of(const KernelParams& k) {
    const LinearParams& p = k.p;
    const int piece = blockIdx.x, slice = blockIdx.y, tile = blockIdx.z;
    const int64_t first_weight = int64_t{tile} * G::kTile, first_row = int64_t{piece} * G::kColumns;
    const int64_t begin = slice * k.plan.slices.depth;
    const bool is_once = k.plan.num_pieces == 1;  // read, so that nothing need stay in the cache
    Work<T, W> w;
    w.weights = static_cast<const W*>(p.weight) + first_weight * p.depth;
    w.x = p.x;
    w.second = p.second;
    w.depth = p.depth;
    w.second_begin = static_cast<int>(p.second_begin);
    w.first_row = static_cast<int>(first_row);
    w.num_weights = static_cast<int>(min(p.num_outputs - first_weight, int64_t{G::kTile}));
    w.num_rows = static_cast<int>(min(p.num_rows - first_row, int64_t{G::kColumns}));
    w.begin = static_cast<int>(begin);
    w.end = static_cast<int>(min(p.depth, begin + k.plan.slices.depth));
    w.weight_policy = is_once ? ptx::evict_first() : ptx::evict_normal();
    w.row_policy = ptx::evict_last();
    return w;
}

template <typename T, typename W, bool kHasMaxima, int kTile, int kColumns>
__global__ void __launch_bounds__(Tiling<T, kTile, kColumns>::kThreads, kColumns > 64 ? 1 : 2)
    linear_kernel(const KernelParams k) {
    ptx::let_next_start();
    using G = Tiling<T, kTile, kColumns, W>;
    const LinearParams& p = k.p;
    const Plan& plan = k.plan;
    T* ring = reinterpret_cast<T*>(dynamic_shared());
    float* staged = reinterpret_cast<float*>(ring);
    Sums<G> sums = {};
    if (!multiply<G>(work_of<G, T, W>(k), p.openness, ring, plan.num_stages, sums)) return;
    if (plan.slices.count == 1) {
        __syncthreads();  // the ring is no longer read
        put_all_staged<G>(staged, sums);
    } else {
        SPECRT_SHARED(int, flag);
        const int64_t index = int64_t{blockIdx.z} * plan.num_pieces + blockIdx.x;
        auto* first = reinterpret_cast<float4*>(p.workspace + kMaxTickets);
        const Parts<G> parts{first + index * plan.slices.count * Parts<G>::kPart};
        write_part(parts, blockIdx.y, sums);
        auto* ticket = reinterpret_cast<unsigned*>(p.workspace) + index;
        if (!is_last_block(ticket, plan.slices.count, &flag)) return;
        merge_all(parts, plan.slices.count, staged);
    }
    __syncthreads();
    const Target target{
        static_cast<int>(blockIdx.z) * kTile, static_cast<int>(blockIdx.x) * kColumns,
        static_cast<int>(p.is_gated ? p.num_outputs / 2 : p.num_outputs), plan.is_whole};
    write_results<G>(p, target, staged);
    if constexpr (kHasMaxima)
        if (p.maxima.keys) write_maxima<G>(p, target, staged);
}

template <typename T, typename W, bool kHasMaxima, int kTile, int kColumns>
void start_padded(const KernelParams& k, CudaStream stream) {
    const Plan& plan = k.plan;
    const LaunchShape shape{
        dim3(static_cast<unsigned>(plan.num_pieces), static_cast<unsigned>(plan.slices.count),
             static_cast<unsigned>(plan.num_tiles)),
        dim3(Tiling<T, kTile, kColumns>::kThreads), plan.shared_bytes, kOverlaps};
    SPECRT_LAUNCH((linear_kernel<T, W, kHasMaxima, kTile, kColumns>), shape, stream, k);
}

template <typename T, bool kHasMaxima, int kTile>
void start_tile(const KernelParams& k, CudaStream stream) {
    switch (k.plan.columns) {
        case 8:
            return start_padded<T, T, kHasMaxima, kTile, 8>(k, stream);
        case 16:
            return start_padded<T, T, kHasMaxima, kTile, 16>(k, stream);
        case 32:
            return start_padded<T, T, kHasMaxima, kTile, 32>(k, stream);
        case 64:
            return start_padded<T, T, kHasMaxima, kTile, 64>(k, stream);
        default:
            return start_padded<T, T, kHasMaxima, kTile, 128>(k, stream);
    }
}

template <typename T, bool kHasMaxima>
void start(const KernelParams& k, CudaStream stream) {
    if constexpr (!kHasMaxima)
        if (k.plan.tile_rows == 64) return start_tile<T, kHasMaxima, 64>(k, stream);
    start_tile<T, kHasMaxima, 128>(k, stream);
}

template <typename T>
void start_narrow(const KernelParams& k, CudaStream stream) {
    if (k.plan.columns == 16) return start_padded<T, e4m3_t, true, 128, 16>(k, stream);
    start_padded<T, e4m3_t, true, 128, 64>(k, stream);
}

}  // namespace specrt::product
