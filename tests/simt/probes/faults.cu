// One planted fault each, beside the kernel that is right.
#include "core/ptx.cuh"
#include "core/reduce.cuh"
#include "probes/probe.h"

namespace probes {
namespace {

// out[i] = the value of another warp's thread, written to shared memory before.
__global__ void exchange(float* out, int has_barrier) {
    SPECRT_SHARED(float[1024], box);
    const unsigned i = threadIdx.x, other = (i + 32) % blockDim.x;
    box[i] = static_cast<float>(i);
    if (has_barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + i] = box[other];
}
PROBE(exchange, p.tensor<float>("out"), p.numbers[0])

}  // namespace
}  // namespace probes
