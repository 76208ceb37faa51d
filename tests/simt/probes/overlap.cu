// Launches that overlap with the one before: a right one, and what can be wrong with it.
#include "core/ptx.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

enum Fault {
    kNone,
    kNoWait,
    kEarlyRead,
    kEarlyWrite,
    kEarlyAtomic,
    kEarlyCopy,
    kEarlyReadInLastBlock,
    kEndWithoutWait,
    kConstantWritten,
};

// out = weight * x: a thread an element, weight[] read while the launch before may still run.
__global__ void scale(float* weight, float* x, float* out, unsigned* ticket, int fault) {
    ptx::let_next_start();
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const bool is_last = blockIdx.x == gridDim.x - 1;
    const float own = weight[i];
    float read = 0.0f;
    if (fault == kEarlyRead || (fault == kEarlyReadInLastBlock && is_last)) read = x[i];
    if (fault == kEarlyWrite) out[i] = own;
    if (fault == kEarlyAtomic) atomicAdd(ticket, 1u);
    if (fault == kEarlyCopy) ptx::cp_async_16(dynamic_shared() + threadIdx.x * 16, x);
    if (fault == kEndWithoutWait && threadIdx.x == 5) return;
    if (fault != kNoWait) ptx::wait_for_previous();
    if (fault == kConstantWritten) weight[i] = own;
    out[i] = own * x[i] + 0.0f * read;
}
PROBE(scale, p.tensor<float>("weight"), p.tensor<float>("x"), p.tensor<float>("out"),
      p.tensor<unsigned>("ticket"), p.numbers[0])

// Threads that have waited meet others that have not yet: both are right.
__global__ void wait_and_meet(const float* x, float* out) {
    SPECRT_SHARED(float, first);
    if (threadIdx.x == 0) {
        ptx::wait_for_previous();
        first = x[blockIdx.x];
    }
    __syncthreads();
    ptx::wait_for_previous();
    out[blockIdx.x * blockDim.x + threadIdx.x] = first + static_cast<float>(threadIdx.x);
}
PROBE(wait_and_meet, p.tensor<const float>("x"), p.tensor<float>("out"))

}  // namespace
}  // namespace probes
