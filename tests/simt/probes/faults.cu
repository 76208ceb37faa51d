// Planted faults. A kernel that takes a flag is right with 1 and wrong with 0.
#include "core/pack.cuh"
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// out[i] = what a thread of the next warp wrote to shared memory.
__global__ void exchange(float* out, int has_barrier) {
    SPECRT_SHARED(float[1024], box);
    const unsigned i = threadIdx.x, other = (i + 32) % blockDim.x;
    box[i] = static_cast<float>(i);
    if (has_barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + i] = box[other];
}
PROBE(exchange, p.tensor<float>("out"), p.numbers[0])

// The same from a lane of the same warp.
__global__ void exchange_in_warp(float* out, int has_barrier) {
    SPECRT_SHARED(float[1024], box);
    const unsigned i = threadIdx.x;
    box[i] = static_cast<float>(i);
    if (has_barrier) __syncwarp();
    out[blockIdx.x * blockDim.x + i] = box[i ^ 5];
}
PROBE(exchange_in_warp, p.tensor<float>("out"), p.numbers[0])

// out = the sum of all blocks' parts, by the block that comes last. The wrong tail takes its ticket
// while other threads of its block may still have to write.
__global__ void sum_in_last_block(float* parts, unsigned* ticket, float* out, int is_right) {
    SPECRT_SHARED(float[32], scratch);
    SPECRT_SHARED(int, flag);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    parts[i] = static_cast<float>(i);
    bool is_last;
    if (is_right) {
        is_last = is_last_block(ticket, gridDim.x, &flag);
    } else {
        if (threadIdx.x == 0) flag = atomicAdd(ticket, 1u) + 1 == gridDim.x;
        __syncthreads();
        is_last = flag != 0;
    }
    if (!is_last) return;
    float sum = 0.0f;
    for (unsigned j = threadIdx.x; j < gridDim.x * blockDim.x; j += blockDim.x) sum += parts[j];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = sum;
}
PROBE(sum_in_last_block, p.tensor<float>("parts"), p.tensor<unsigned>("ticket"),
      p.tensor<float>("out"), p.numbers[0])

// Some threads leave before a barrier.
__global__ void exit_before_barrier(float* out, int num_left) {
    if (static_cast<int>(threadIdx.x) >= num_left) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
PROBE(exit_before_barrier, p.tensor<float>("out"), p.numbers[0])

__global__ void two_barriers(float* out) {
    if (threadIdx.x % 2) {
        __syncthreads();  // line A
    } else {
        __syncthreads();  // line B
    }
    out[threadIdx.x] = 1.0f;
}
PROBE(two_barriers, p.tensor<float>("out"))

__global__ void barrier_against_warp(unsigned lane) {
    if (threadIdx.x == lane) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}
PROBE(barrier_against_warp, 0u)

// Block 0 waits for a word of the grid's last block.
__global__ void wait_for_last_block(int* word) {
    if (blockIdx.x == gridDim.x - 1) atomicExch(word, 1);
    if (blockIdx.x == 0)
        while (atomicAdd(word, 0) == 0) {
        }
}
PROBE(wait_for_last_block, p.tensor<int>("word"))

__global__ void write_at(float* x, int index) {
    if (threadIdx.x == 3) x[index] = 1.0f;
}
PROBE(write_at, p.tensor<float>("x"), p.numbers[0])

__global__ void read_at(const float* x, float* out, int index) {
    if (threadIdx.x == 3) *out = x[index];
}
PROBE(read_at, p.tensor<float>("x"), p.tensor<float>("out"), p.numbers[0])

__global__ void read_null(float* out) {
    const float* volatile nothing = nullptr;
    *out = *nothing;
}
PROBE(read_null, p.tensor<float>("out"))

// On the stream of a GPU, whichever is current.
__global__ void count_launch(float* out) {
    *out += 1;
}
const Registration registered_on_stream_of("on_stream_of", [](const Probe& p) {
    SPECRT_LAUNCH(count_launch, p.shape, simt::stream_of(p.numbers[0]), p.tensor<float>("out"));
});

__global__ void overflow_stack(float* out, int depth) {
    volatile char frame[4096];
    frame[depth % 4096] = 1;
    if (depth > 0) overflow_stack(out, depth - 1);
    *out += static_cast<float>(frame[depth % 4096]);
}
PROBE(overflow_stack, p.tensor<float>("out"), p.numbers[0])

// Block 1 writes element `index` of a static (kind 0) or the dynamic (1) shared array of floats.
__global__ void write_shared(int kind, int index) {
    SPECRT_SHARED(float[32], array);
    auto* dynamic = reinterpret_cast<float*>(dynamic_shared());
    array[threadIdx.x] = 0.0f;
    if (blockIdx.x == 1 && threadIdx.x == 0) (kind == 0 ? array : dynamic)[index] = 1.0f;
}
PROBE(write_shared, p.numbers[0], p.numbers[1])

// What shared memory holds before it is written.
__global__ void read_fresh_shared(float* out) {
    SPECRT_SHARED(float[32], array);
    auto* dynamic = reinterpret_cast<float*>(dynamic_shared());
    out[threadIdx.x] = array[threadIdx.x];
    out[32 + threadIdx.x] = dynamic[threadIdx.x];
    array[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
}
PROBE(read_fresh_shared, p.tensor<float>("out"))

__global__ void big_static_array(float* out) {
    SPECRT_SHARED(float[8192], first);
    SPECRT_SHARED(float[8192], second);
    first[threadIdx.x] = second[threadIdx.x] = 1.0f;
    out[0] = first[0] + second[0];
}
PROBE(big_static_array, p.tensor<float>("out"))

// Each half of a warp shuffles with a mask of its own; `source` is a lane of the whole warp.
__global__ void shuffle_from(int* out, unsigned low_mask, unsigned high_mask, int source) {
    const unsigned mask = threadIdx.x < 16 ? low_mask : high_mask;
    out[threadIdx.x] = __shfl_sync(mask, static_cast<int>(threadIdx.x), source);
}
PROBE(shuffle_from, p.tensor<int>("out"), static_cast<unsigned>(p.numbers[0]),
      static_cast<unsigned>(p.numbers[1]), p.numbers[2])

__global__ void different_operations(unsigned middle) {
    if (threadIdx.x < middle) {
        __syncwarp();
    } else {
        (void)__ballot_sync(kAll, 1);
    }
}
PROBE(different_operations, 16u)

// Lanes at and above `num_left` leave, the others vote with the full mask.
__global__ void vote_after_exit(int* out, int num_left) {
    if (static_cast<int>(threadIdx.x) >= num_left) return;
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kAll, 1));
}
PROBE(vote_after_exit, p.tensor<int>("out"), p.numbers[0])

__global__ void load_matrix_at(int* out, int offset) {
    uint32_t r[4];
    unsigned char* shared = dynamic_shared();
    for (unsigned i = threadIdx.x; i < 512; i += 32) shared[i] = 0;
    __syncwarp();
    ptx::ldmatrix_x4(r, shared + threadIdx.x * 16 + (threadIdx.x == 9 ? offset : 0));
    out[threadIdx.x] = static_cast<int>(r[0]);
}
PROBE(load_matrix_at, p.tensor<int>("out"), p.numbers[0])

__global__ void misaligned_atomic(unsigned char* word) {
    atomicAdd(reinterpret_cast<unsigned*>(word + 2), 1u);
}
PROBE(misaligned_atomic, p.tensor<unsigned char>("word"))

__global__ void copy_pack(const float* x, float* out, int offset, int to) {
    store_pack(out + to, load_pack<4>(x + offset));
}
PROBE(copy_pack, p.tensor<float>("x"), p.tensor<float>("out"), p.numbers[0], p.numbers[1])

}  // namespace
}  // namespace probes
