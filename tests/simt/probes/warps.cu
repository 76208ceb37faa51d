// Operations of warps and blocks that are as they should be.
#include "core/reduce.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

template <typename T>
__device__ T shuffled(unsigned mask, T value, int kind, int argument, int width) {
    const auto delta = static_cast<unsigned>(argument);
    if (kind == 0) return __shfl_sync(mask, value, argument, width);
    if (kind == 1) return __shfl_up_sync(mask, value, delta, width);
    if (kind == 2) return __shfl_down_sync(mask, value, delta, width);
    return __shfl_xor_sync(mask, value, argument, width);
}

template <typename T>
__device__ void shuffle_as(T* out, int kind, int argument, int width) {
    const unsigned i = threadIdx.x;
    out[i] = shuffled(kFullWarp, static_cast<T>(100 + i), kind, argument, width);
}

// kinds 0 to 3: by index, up, down, xor.
__global__ void shuffle(int* ints, int64_t* longs, double* doubles, f16_t* halves, int kind,
                        int argument, int width) {
    shuffle_as(ints, kind, argument, width);
    shuffle_as(longs, kind, argument, width);
    shuffle_as(doubles, kind, argument, width);
    const f16_t half = __float2half(static_cast<float>(100 + threadIdx.x));
    halves[threadIdx.x] = shuffled(kFullWarp, half, kind, argument, width);
}
PROBE(shuffle, p.tensor<int>("ints"), p.tensor<int64_t>("longs"), p.tensor<double>("doubles"),
      p.tensor<f16_t>("halves"), p.numbers[0], p.numbers[1], p.numbers[2])

// Lanes of `mask` take part together, the others among themselves.
__global__ void vote(const int* x, int* out, unsigned mask_a) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned mask = mask_a >> lane & 1 ? mask_a : ~mask_a;
    const int value = x[threadIdx.x];
    const auto u = static_cast<unsigned>(value);
    int* row = out + threadIdx.x * 12;
    row[0] = static_cast<int>(__ballot_sync(mask, value > 0));
    row[1] = __any_sync(mask, value > 0);
    row[2] = __all_sync(mask, value > 0);
    row[3] = __reduce_add_sync(mask, value);
    row[4] = __reduce_min_sync(mask, value);
    row[5] = __reduce_max_sync(mask, value);
    row[6] = static_cast<int>(__reduce_add_sync(mask, u));
    row[7] = static_cast<int>(__reduce_min_sync(mask, u));
    row[8] = static_cast<int>(__reduce_max_sync(mask, u));
    row[9] = static_cast<int>(__reduce_and_sync(mask, u));
    row[10] = static_cast<int>(__reduce_or_sync(mask, u));
    row[11] = static_cast<int>(__reduce_xor_sync(mask, u));
}
PROBE(vote, p.tensor<const int>("x"), p.tensor<int>("out"), static_cast<unsigned>(p.numbers[0]))

__global__ void block_vote(const int* x, int* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i * 3] = __syncthreads_count(x[i]);
    out[i * 3 + 1] = __syncthreads_or(x[i]);
    out[i * 3 + 2] = __syncthreads_and(x[i]);
}
PROBE(block_vote, p.tensor<const int>("x"), p.tensor<int>("out"))

// Each block's sum to its threads, `num_rounds` times through one scratch.
__global__ void sum_blocks(const float* x, float* out, int num_rounds) {
    SPECRT_SHARED(float[32], scratch);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int round = 0; round < num_rounds; ++round) {
        const float sum = block_sum(x[i] + static_cast<float>(round), scratch);
        __syncthreads();
        if (round + 1 == num_rounds) out[i] = sum;
    }
}
PROBE(sum_blocks, p.tensor<const float>("x"), p.tensor<float>("out"), p.numbers[0])

// out[its linear number] = what each thread believes to be.
__global__ void where(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned block_size = blockDim.x * blockDim.y * blockDim.z;
    // Linear threads 32 i .. 32 i + 31 are a warp: its first lane tells its own number.
    const int first = __shfl_sync(kFullWarp, static_cast<int>(thread), 0);
    const unsigned ids[] = {blockIdx.x,
                            blockIdx.y,
                            blockIdx.z,
                            threadIdx.x,
                            threadIdx.y,
                            threadIdx.z,
                            thread - static_cast<unsigned>(first)};
    for (int i = 0; i < 7; ++i)
        out[(block * block_size + thread) * 7 + i] = static_cast<int>(ids[i]);
}
PROBE(where, p.tensor<int>("out"))

__global__ void limits(int* out) {
    const DeviceLimits device = device_limits(current_device());
    out[0] = device.num_sms;
    out[1] = static_cast<int>(device.shared_bytes);
}
PROBE(limits, p.tensor<int>("out"))

// Every thread of the grid adds 1 (and its number) everywhere.
__global__ void count_atomically(int* i, unsigned long long* u, float* f, double* d) {
    const int me = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&i[0], 1);
    atomicMax(&i[1], me);
    atomicMin(&i[2], -me);
    atomicOr(&i[3], 1 << me % 31);
    atomicAnd(&i[4], ~(1 << me % 31));
    atomicExch(&i[5], me);
    atomicInc(reinterpret_cast<unsigned*>(&i[6]), 6u);
    while (atomicCAS(&i[7], 0, 1) != 0) {
    }
    i[8] += 1;  // under the lock
    atomicExch(&i[7], 0);
    i[9 + me] = static_cast<int>(
        atomicAdd(reinterpret_cast<unsigned*>(&i[8 + gridDim.x * blockDim.x + 1]), 1u));
    atomicAdd(&u[0], 1ull << 40);
    atomicMax(&u[1], 1ull << me % 60);
    atomicAdd(f, 1.0f);
    atomicAdd(d, 0.5);
}
PROBE(count_atomically, p.tensor<int>("i"), p.tensor<unsigned long long>("u"), p.tensor<float>("f"),
      p.tensor<double>("d"))

}  // namespace
}  // namespace probes
