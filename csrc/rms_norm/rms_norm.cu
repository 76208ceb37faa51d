// Which thread takes which elements of a row, and the order of the sums, follow from the width and
// the type alone. Rows whose addresses or width do not suit 16-byte loads only move their elements
// one by one: same threads, same order, same bits.
//
//     a row of 4096 bfloat16: 512 pieces of 16 bytes, 256 threads with two each
//     piece     0         1               255         256 ...        511
//     thread    0         1      ...      255         0       ...    255
//
// Neighbours load neighbouring pieces, so a warp's load is 512 bytes in a row; a thread sums its
// own pieces in their order, then lanes and warps meet in a tree.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "rms_norm/rms_norm.h"

namespace specrt {
namespace {

constexpr int kGroupBlock = 128;  // threads of a block that takes several narrow rows
constexpr int kLongBlock = 1024;

template <typename T>
struct Row {
    const T* x;
    T *residual, *out;
};

template <typename T>
__device__ __forceinline__ Row<T> row_at(const RmsNormParams& p, unsigned index) {
    const unsigned num_slices = static_cast<unsigned>(p.num_slices);
    const int64_t row = index / num_slices, slice = index % num_slices;
    const auto at = [&](const int64_t* stride) { return row * stride[0] + slice * stride[1]; };
    return {static_cast<const T*>(p.x) + at(p.x_stride),
            p.residual ? static_cast<T*>(p.residual) + at(p.residual_stride) : nullptr,
            static_cast<T*>(p.out) + at(p.out_stride)};
}

// A thread's part of a row: kPieces pieces of 16 bytes, piece i at (thread + i * num_threads).
template <typename T, int kPieces>
struct Part {
    static constexpr int kSize = 16 / sizeof(T);
    Pack<T, kSize> value[kPieces];
    Pack<float, kSize> weight[kPieces];
    int thread, num_threads, width;
    bool is_whole;

    __device__ __forceinline__ int first(int piece) const {
        return (thread + piece * num_threads) * kSize;
    }

    __device__ __forceinline__ void load_weights(const float* weights) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            weight[i] = load_piece<kSize>(weights, first(i), width, is_whole);
    }

    __device__ __forceinline__ void load(const T* x) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            value[i] = load_piece<kSize>(x, first(i), width, is_whole);
    }

    __device__ __forceinline__ void add_residual(T* residual) {
        Pack<T, kSize> other[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            other[i] = load_piece<kSize>(residual, first(i), width, is_whole);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
#pragma unroll
            for (int e = 0; e < kSize; ++e)
                value[i].at[e] = from_float<T>(to_float(other[i].at[e]) + to_float(value[i].at[e]));
            store_piece(residual, first(i), width, is_whole, value[i]);
        }
    }

    __device__ __forceinline__ float sum_of_squares() const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
            for (int e = 0; e < kSize; ++e) {
                const float v = to_float(value[i].at[e]);
                sum = fmaf(v, v, sum);
            }
        return sum;
    }

    __device__ __forceinline__ void store_scaled(T* out, float scale) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            Pack<T, kSize> scaled;
#pragma unroll
            for (int e = 0; e < kSize; ++e)
                scaled.at[e] = from_float<T>(to_float(value[i].at[e]) * scale * weight[i].at[e]);
            store_piece(out, first(i), width, is_whole, scaled);
        }
    }
};

__device__ __forceinline__ float scale_of(const RmsNormParams& p, float sum) {
    return 1.0f / sqrtf(sum / static_cast<float>(p.width) + p.eps);
}

template <int kLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

// kLanes lanes a row. Groups past the last row go along, with a width of nothing.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kGroupBlock)
    rms_norm_groups(const RmsNormParams p, const bool is_whole) {
    ptx::let_next_start();
    const unsigned index = blockIdx.x * (kGroupBlock / kLanes) + threadIdx.x / kLanes;
    const bool is_row = index < static_cast<unsigned>(p.num_rows * p.num_slices);
    const Row<T> row = row_at<T>(p, is_row ? index : 0);
    Part<T, 1> part;
    part.thread = threadIdx.x % kLanes;
    part.num_threads = kLanes;
    part.width = is_row ? static_cast<int>(p.width) : 0;
    part.is_whole = is_whole;
    part.load_weights(p.weight);  // constants, while the launch before may still run
    ptx::wait_for_previous();
    part.load(row.x);
    if (row.residual) part.add_residual(row.residual);
    part.store_scaled(row.out, scale_of(p, group_sum<kLanes>(part.sum_of_squares())));
}

// One block a row, held in registers.
template <typename T, int kPieces>
__global__ void __launch_bounds__(kPieces == 1 ? 256 : 512)
    rms_norm_rows(const RmsNormParams p, const bool is_whole) {
    ptx::let_next_start();
    SPECRT_SHARED(float[32], scratch);
    const Row<T> row = row_at<T>(p, blockIdx.x);
    Part<T, kPieces> part;
    part.thread = threadIdx.x;
    part.num_threads = blockDim.x;
    part.width = static_cast<int>(p.width);
    part.is_whole = is_whole;
    part.load_weights(p.weight);
    ptx::wait_for_previous();
    part.load(row.x);
    if (row.residual) part.add_residual(row.residual);
    part.store_scaled(row.out, scale_of(p, block_sum(part.sum_of_squares(), scratch)));
}

// One block a row that no block's registers hold: each thread goes over its part twice.
template <typename T>
__global__ void __launch_bounds__(kLongBlock)
    rms_norm_long_rows(const RmsNormParams p, const bool is_whole) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    SPECRT_SHARED(float[32], scratch);
    const Row<T> row = row_at<T>(p, blockIdx.x);
    Part<T, 1> part;
    part.num_threads = blockDim.x;
    part.width = static_cast<int>(p.width);
    part.is_whole = is_whole;
    const int num_pieces = (part.width - 1) / part.kSize + 1;
    float sum = 0.0f;
    for (part.thread = threadIdx.x; part.thread < num_pieces; part.thread += kLongBlock) {
        part.load(row.x);
        if (row.residual) part.add_residual(row.residual);
        sum += part.sum_of_squares();
    }
    const float scale = scale_of(p, block_sum(sum, scratch));
    const T* again = row.residual ? row.residual : row.x;
    for (part.thread = threadIdx.x; part.thread < num_pieces; part.thread += kLongBlock) {
        part.load(again);
        part.load_weights(p.weight);
        part.store_scaled(row.out, scale);
    }
}

template <typename T, int kLanes>
void launch_groups(const RmsNormParams& p, bool is_whole, CudaStream stream) {
    const LaunchShape shape{dim3(ceil_div(p.num_rows * p.num_slices, kGroupBlock / kLanes)),
                            dim3(kGroupBlock), 0, kOverlaps};
    SPECRT_LAUNCH((rms_norm_groups<T, kLanes>), shape, stream, p, is_whole);
}

template <typename T, int kPieces>
void launch_rows(const RmsNormParams& p, bool is_whole, unsigned pieces, CudaStream stream) {
    const unsigned warps = ceil_div(pieces, 32 * kPieces);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows * p.num_slices)),
                            dim3(32 * warps), 0, kOverlaps};
    SPECRT_LAUNCH((rms_norm_rows<T, kPieces>), shape, stream, p, is_whole);
}

template <typename T>
void launch(const RmsNormParams& p, bool is_whole, CudaStream stream) {
    const unsigned pieces = ceil_div(p.width, 16 / sizeof(T));
    if (pieces <= 8) return launch_groups<T, 8>(p, is_whole, stream);
    if (pieces <= 16) return launch_groups<T, 16>(p, is_whole, stream);
    if (pieces <= 32) return launch_groups<T, 32>(p, is_whole, stream);
    if (pieces <= 256) return launch_rows<T, 1>(p, is_whole, pieces, stream);
    if (pieces <= 1024) return launch_rows<T, 2>(p, is_whole, pieces, stream);
    if (pieces <= 2048) return launch_rows<T, 4>(p, is_whole, pieces, stream);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows * p.num_slices)),
                            dim3(kLongBlock), 0, kOverlaps};
    SPECRT_LAUNCH(rms_norm_long_rows<T>, shape, stream, p, is_whole);
}

bool can_move_whole_pieces(const RmsNormParams& p) {
    const int64_t bytes = size_of(p.dtype);
    bool fits = is_multiple_of_16(p.x) && is_multiple_of_16(p.residual) &&
                is_multiple_of_16(p.out) && is_multiple_of_16(p.weight) &&
                is_multiple_of_16(p.width * bytes);
    for (int i = 0; i < 2; ++i)
        fits = fits && is_multiple_of_16(p.x_stride[i] * bytes) &&
               is_multiple_of_16(p.residual_stride[i] * bytes) &&
               is_multiple_of_16(p.out_stride[i] * bytes);
    return fits;
}

}  // namespace

void rms_norm_cuda(const void* params, CudaStream stream) {
    const auto& p = *static_cast<const RmsNormParams*>(params);
    if (p.num_rows * p.num_slices * p.width == 0) return;
    const bool is_whole = can_move_whole_pieces(p);
    with_float_type(p.dtype, [&](auto type) { launch<decltype(type)>(p, is_whole, stream); });
}

}  // namespace specrt
