// Norms of rows on a GPU, of two kinds.
//
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
#pragma once
#include "core/norm.h"
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"

namespace specrt {
namespace {

// x / sqrt(mean(x^2) + eps) * weight
struct RootMeanSquare {
    static constexpr bool kIsCentred = false;
};
// (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
struct Centred {
    static constexpr bool kIsCentred = true;
};

constexpr int kGroupBlock = 128;  // threads of a block that takes several narrow rows
constexpr int kLongBlock = 1024;

template <typename T>
struct Row {
    const T* x;
    T *residual, *out;
};

template <typename T>
__device__ __forceinline__ Row<T> row_at(const NormRows& p, unsigned index) {
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

    __device__ __forceinline__ float sum() const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
            for (int e = 0; e < kSize; ++e) sum += to_float(value[i].at[e]);
        return sum;
    }

    // Past the width there is nothing, which a mean must not be taken from.
    __device__ __forceinline__ float sum_of_squares_around(float mean) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
            for (int e = 0; e < kSize; ++e) {
                const float v = first(i) + e < width ? to_float(value[i].at[e]) - mean : 0.0f;
                sum = fmaf(v, v, sum);
            }
        return sum;
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

    __device__ __forceinline__ void store_centred(T* out, float mean, float scale,
                                                  const float* biases) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            Pack<float, kSize> bias{};
            if (biases) bias = load_piece<kSize>(biases, first(i), width, is_whole);
            Pack<T, kSize> moved;
#pragma unroll
            for (int e = 0; e < kSize; ++e) {
                const float y = (to_float(value[i].at[e]) - mean) * scale * weight[i].at[e];
                moved.at[e] = from_float<T>(biases ? y + bias.at[e] : y);
            }
            store_piece(out, first(i), width, is_whole, moved);
        }
    }
};

__device__ __forceinline__ float scale_of(const NormRows& p, float sum) {
    return 1.0f / sqrtf(sum / static_cast<float>(p.width) + p.eps);
}

// Of a row that its threads hold; `sum_all` is over them, for the i-th time.
template <typename Kind, typename Held, typename T, typename F>
__device__ __forceinline__ void norm_held(const NormRows& p, const Held& part, T* out, F sum_all) {
    if constexpr (Kind::kIsCentred) {
        const float mean = sum_all(part.sum(), 0) / static_cast<float>(p.width);
        const float squares = sum_all(part.sum_of_squares_around(mean), 1);
        part.store_centred(out, mean, scale_of(p, squares), p.bias);
    } else {
        part.store_scaled(out, scale_of(p, sum_all(part.sum_of_squares(), 0)));
    }
}

template <int kLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

// kLanes lanes a row. Groups past the last row go along, with a width of nothing.
template <typename Kind, typename T, int kLanes>
__global__ void __launch_bounds__(kGroupBlock) norm_groups(const NormRows p, const bool is_whole) {
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
    norm_held<Kind>(p, part, row.out, [](float x, int) { return group_sum<kLanes>(x); });
}

// One block a row, held in registers. (Not told that one block an SM will do, ptxas spills some of
// a centred row's to keep two.)
template <typename Kind, typename T, int kPieces>
__global__ void __launch_bounds__(kPieces == 1 ? 256 : 512, Kind::kIsCentred ? 1 : 0)
    norm_rows(const NormRows p, const bool is_whole) {
    ptx::let_next_start();
    SPECRT_SHARED(float[64], scratch);
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
    norm_held<Kind>(p, part, row.out,
                    [&](float x, int time) { return block_sum(x, scratch + 32 * time); });
}

// One block a row that no block's registers hold: each thread goes over its part once for each sum,
// and once more.
template <typename Kind, typename T>
__global__ void __launch_bounds__(kLongBlock)
    norm_long_rows(const NormRows p, const bool is_whole) {
    ptx::let_next_start();
    ptx::wait_for_previous();
    SPECRT_SHARED(float[64], scratch);
    const Row<T> row = row_at<T>(p, blockIdx.x);
    Part<T, 1> part;
    part.num_threads = blockDim.x;
    part.width = static_cast<int>(p.width);
    part.is_whole = is_whole;
    const auto for_pieces = [&](auto&& f) {
        const int num_pieces = (part.width - 1) / part.kSize + 1;
        for (part.thread = threadIdx.x; part.thread < num_pieces; part.thread += kLongBlock) f();
    };
    const T* again = row.residual ? row.residual : row.x;
    float sum = 0.0f;
    for_pieces([&] {
        part.load(row.x);
        if (row.residual) part.add_residual(row.residual);
        sum += Kind::kIsCentred ? part.sum() : part.sum_of_squares();
    });
    const float total = block_sum(sum, scratch);
    float scale, mean = 0.0f;
    if constexpr (Kind::kIsCentred) {
        mean = total / static_cast<float>(p.width);
        float squares = 0.0f;
        for_pieces([&] {
            part.load(again);
            squares += part.sum_of_squares_around(mean);
        });
        scale = scale_of(p, block_sum(squares, scratch + 32));
    } else {
        scale = scale_of(p, total);
    }
    for_pieces([&] {
        part.load(again);
        part.load_weights(p.weight);
        if constexpr (Kind::kIsCentred) {
            part.store_centred(row.out, mean, scale, p.bias);
        } else {
            part.store_scaled(row.out, scale);
        }
    });
}

template <typename Kind, typename T, int kLanes>
void launch_groups(const NormRows& p, bool is_whole, CudaStream stream) {
    const LaunchShape shape{dim3(ceil_div(p.num_rows * p.num_slices, kGroupBlock / kLanes)),
                            dim3(kGroupBlock), 0, kOverlaps};
    SPECRT_LAUNCH((norm_groups<Kind, T, kLanes>), shape, stream, p, is_whole);
}

template <typename Kind, typename T, int kPieces>
void launch_rows(const NormRows& p, bool is_whole, unsigned pieces, CudaStream stream) {
    const unsigned warps = ceil_div(pieces, 32 * kPieces);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows * p.num_slices)),
                            dim3(32 * warps), 0, kOverlaps};
    SPECRT_LAUNCH((norm_rows<Kind, T, kPieces>), shape, stream, p, is_whole);
}

template <typename Kind, typename T>
void launch_norm(const NormRows& p, bool is_whole, CudaStream stream) {
    const unsigned pieces = ceil_div(p.width, 16 / sizeof(T));
    if (pieces <= 8) return launch_groups<Kind, T, 8>(p, is_whole, stream);
    if (pieces <= 16) return launch_groups<Kind, T, 16>(p, is_whole, stream);
    if (pieces <= 32) return launch_groups<Kind, T, 32>(p, is_whole, stream);
    if (pieces <= 256) return launch_rows<Kind, T, 1>(p, is_whole, pieces, stream);
    if (pieces <= 1024) return launch_rows<Kind, T, 2>(p, is_whole, pieces, stream);
    if (pieces <= 2048) return launch_rows<Kind, T, 4>(p, is_whole, pieces, stream);
    const LaunchShape shape{dim3(static_cast<unsigned>(p.num_rows * p.num_slices)),
                            dim3(kLongBlock), 0, kOverlaps};
    SPECRT_LAUNCH((norm_long_rows<Kind, T>), shape, stream, p, is_whole);
}

bool can_move_whole_pieces(const NormRows& p) {
    const int64_t bytes = size_of(p.dtype);
    bool fits = is_multiple_of_16(p.x) && is_multiple_of_16(p.residual) &&
                is_multiple_of_16(p.out) && is_multiple_of_16(p.weight) &&
                is_multiple_of_16(p.bias) && is_multiple_of_16(p.width * bytes);
    for (int i = 0; i < 2; ++i)
        fits = fits && is_multiple_of_16(p.x_stride[i] * bytes) &&
               is_multiple_of_16(p.residual_stride[i] * bytes) &&
               is_multiple_of_16(p.out_stride[i] * bytes);
    return fits;
}

template <typename Kind>
void launch_norm(const NormRows& p, CudaStream stream) {
    if (p.num_rows * p.num_slices * p.width == 0) return;
    const bool is_whole = can_move_whole_pieces(p);
    with_float_type(p.dtype,
                    [&](auto type) { launch_norm<Kind, decltype(type)>(p, is_whole, stream); });
}

}  // namespace
}  // namespace specrt
